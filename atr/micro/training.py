"""Trains the micro models: first to read what image patches contain, then to answer questions as well."""

import time
from collections.abc import Callable
from copy import deepcopy
from typing import Any, NamedTuple

import lightning
import torch
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from transformers import LlamaModel, LlavaForConditionalGeneration, LlavaProcessor

from atr.micro.curriculum import LessonDataModule, LessonDataset, StoredLessons, count_reading_steps
from atr.micro.losses import CharacterHeads, DigitHeads, answer_loss, name_loss, normalise_states
from atr.micro.params import Recipe
from atr.micro.targets import BLANK, TURN_TOKENS, Collator
from atr.reduction.checkpoints import Checkpoints, WholeCheckpoints


class TowerStates(NamedTuple):
    """Features (B, N, D) of a vision tower and, if it is trained, its states after two inner layers."""

    features_BND: Tensor
    reading_BND: Tensor | None = None
    """After an inner layer; the character loss is applied to it."""
    naming_BND: Tensor | None = None
    """After a later inner layer; the name loss is applied to it."""


class MicroTraining(lightning.LightningModule):
    """Trains tower and projector to read in a first phase, and then the whole model to answer as well.

    If the tower is trained, the patch losses also apply to inner layers: the character loss to an earlier
    one, the name loss to a later one. A value must look up the key of its line, so keys have to be known
    before the last layer.

    If the tower is frozen, the projector and the first `new_layers` layers of the language model learn to
    read, and inputs may be stored features. These layers are causal, and in a chart a value precedes its
    label, so the value's patches cannot be named by the label. Instead each patch of text predicts the digits
    of its question so far, so that a label predicts its value.
    """

    def __init__(
        self,
        model: LlavaForConditionalGeneration,
        recipe: Recipe,
        score: Callable[[LlavaForConditionalGeneration, str], float],
        encode: Callable[[Tensor], TowerStates],
        new_layers: int = 0,
    ) -> None:
        """`score` evaluates the model on one benchmark; `encode` runs the tower on a batch of inputs."""
        super().__init__()
        self.model, self.recipe, self.score, self.encode = model, recipe, score, encode
        self.new_layers = new_layers
        self._seconds_before, self._started = 0.0, time.monotonic()
        # On a CPU the backward pass of fused attention makes a step 1.5 times as long.
        model.set_attn_implementation("eager")
        vision, text = model.config.vision_config.hidden_size, model.config.text_config.hidden_size
        self.trains_tower = all(part.requires_grad for part in model.model.vision_tower.parameters())
        self.first_layers = _share_first_layers(model.model.language_model, new_layers)
        self.character_heads = CharacterHeads(vision if self.trains_tower else text)
        if self.trains_tower:
            self.naming_projection = nn.Linear(vision, text)
        else:
            self.digit_heads = DigitHeads(text)
        if recipe.compile:
            model.model.vision_tower.compile()
            model.model.language_model.compile()

    def run_language_model(self, image_BND: Tensor, text_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, L, V) of every text token, given `<s>`, the projected image and the text before it.

        Also returns the image patches' naming states (B, N, D), i.e. those after `new_layers` layers.
        """
        llava, tokens, layer = self.model.model, image_BND.shape[1], self.new_layers
        sequence = self._embed_sequence(image_BND, text_BL)
        states = llava.language_model(inputs_embeds=sequence, use_cache=False, output_hidden_states=layer > 0)
        logits_BLV: Tensor = self.model.lm_head(states.last_hidden_state[:, tokens:-1])
        return logits_BLV, states.hidden_states[layer][:, 1 : 1 + tokens] if layer else image_BND

    def compute_naming_states(self, image_BND: Tensor, text_BL: Tensor) -> Tensor:
        """The naming states of `run_language_model`, without running the layers after them."""
        sequence = self._embed_sequence(image_BND, text_BL[:, :0])
        states_BND: Tensor = self.first_layers(inputs_embeds=sequence, use_cache=False).last_hidden_state
        return states_BND[:, 1:]

    def _embed_sequence(self, image_BND: Tensor, text_BL: Tensor) -> Tensor:
        """Embeddings of `<s>`, the projected image and the text: (B, 1 + N + L, D)."""
        embed = self.model.get_input_embeddings()
        start_B1D = embed(text_BL.new_full((len(text_BL), 1), self.model.config.text_config.bos_token_id))
        return torch.cat([start_B1D, image_BND, embed(text_BL)], dim=1)

    def patch_losses(
        self, tower: TowerStates, image_BND: Tensor, naming_BND: Tensor, batch: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Character and name loss, each averaged over the states it applies to.

        With a frozen tower also the digit loss.
        """
        characters_BN2, reading, naming = batch["characters"], [image_BND], [naming_BND]
        if self.trains_tower:
            assert tower.reading_BND is not None and tower.naming_BND is not None
            reading = [tower.reading_BND, tower.features_BND]
            naming.append(self.naming_projection(normalise_states(tower.naming_BND)))
        embedding_VD, names_BN2 = self.model.get_input_embeddings().weight, batch["names"]
        has_text_BN = characters_BN2[..., 0] != BLANK
        character = [self.character_heads.loss(states_BND, characters_BN2) for states_BND in reading]
        name = [name_loss(states_BND, embedding_VD, names_BN2, has_text_BN) for states_BND in naming]
        losses = {"characters": torch.stack(character).mean(), "names": torch.stack(name).mean()}
        if not self.trains_tower:
            losses["digits"] = self.digit_heads.loss(naming_BND, batch["digits"])
        return losses

    def training_step(self, batch: dict[str, Tensor], batch_index: int) -> Tensor:
        """The patch losses, and in the answering phase the answer loss as well."""
        tower = self.encode(batch["inputs"])
        image_BND = self.model.model.multi_modal_projector(tower.features_BND)
        if self.global_step < count_reading_steps(self.recipe):
            losses = self.patch_losses(
                tower, image_BND, self.compute_naming_states(image_BND, batch["text"]), batch
            )
            loss = torch.stack([*losses.values()]).sum()
        else:
            logits_BLV, naming_BND = self.run_language_model(image_BND, batch["text"])
            losses = self.patch_losses(tower, image_BND, naming_BND, batch)
            answers = answer_loss(logits_BLV, batch["labels"])
            loss = answers + self.recipe.reading_weight * torch.stack([*losses.values()]).sum()
            losses["answers"] = answers
        self.log_dict({f"train/{name}": value for name, value in losses.items()}, prog_bar=True)
        return loss

    def validation_step(self, benchmark: str, batch_index: int) -> None:
        """Log the score on one benchmark, in the answering phase."""
        if self.global_step > count_reading_steps(self.recipe):
            # Generation has a new shape at every step and would be recompiled each time.
            with torch.compiler.set_stance("force_eager"):
                score = self.score(self.model, benchmark)
            self.log(f"validation/{benchmark}", score, prog_bar=True, batch_size=1)

    @property
    def seconds(self) -> float:
        """Seconds of training so far, including those before an interruption."""
        return self._seconds_before + time.monotonic() - self._started

    def on_fit_start(self) -> None:
        """Start the clock."""
        self._started = time.monotonic()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the training time with the weights."""
        checkpoint["seconds"] = self.seconds

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the training time."""
        self._seconds_before = checkpoint["seconds"]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with the schedule of `_rate`."""
        recipe = self.recipe
        optimizer = torch.optim.AdamW(
            (parameter for parameter in self.parameters() if parameter.requires_grad),
            recipe.learning_rate,
            betas=(0.9, 0.98),
            weight_decay=recipe.weight_decay,
            fused=True,
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip gradients here: Lightning refuses to for a fused optimizer, which makes steps 5 % faster."""
        nn.utils.clip_grad_norm_(self.parameters(), 1.0)

    def _rate(self, step: int) -> float:
        """Factor of the learning rate: linear warm-up, constant, then linear decay to 2 %."""
        recipe = self.recipe
        decay = (recipe.steps - step) / (recipe.steps * (1 - recipe.constant))
        return min(1.0, (step + 1) / recipe.warmup_steps, max(0.02, decay))


def _share_first_layers(language: LlamaModel, count: int) -> LlamaModel:
    """A model that shares the first `count` layers of `language` and has no final norm."""
    settings = deepcopy(language.config)
    settings.num_hidden_layers = count
    first = LlamaModel(settings)
    first.embed_tokens, first.layers, first.norm = (
        language.embed_tokens,
        language.layers[:count],
        nn.Identity(),
    )
    return first


def encode_pictures(
    model: LlavaForConditionalGeneration, reading_layer: int, naming_layer: int, images_BHWC: Tensor
) -> TowerStates:
    """States of the patches of uint8 images after the tower's last layer and two inner ones."""
    pixels_BCHW = images_BHWC.permute(0, 3, 1, 2) / 127.5 - 1
    states = model.model.vision_tower(pixels_BCHW, output_hidden_states=True).hidden_states
    return TowerStates(*(states[layer][:, 1:] for layer in (-1, reading_layer, naming_layer)))


def encode_stored(standardise: Callable[[Tensor], Tensor], features_BND: Tensor) -> TowerStates:
    """Standardise features of a store, in place of running the frozen tower."""
    return TowerStates(standardise(features_BND))


def train_micro_model(
    module: MicroTraining,
    lessons: LessonDataset | StoredLessons,
    processor: LlavaProcessor,
    checkpoints: Checkpoints,
    logger: Logger,
    trainer_kwargs: dict[str, Any],
) -> None:
    """Train, resuming from the last of `checkpoints` if there is one.

    Always on one device: the model is too small to gain from more, and phases and lessons are counted in
    steps of one device.
    """
    size = module.model.config.vision_config.image_size
    trainer = lightning.Trainer(
        **trainer_kwargs | {"devices": 1, "num_nodes": 1, "strategy": "auto"},
        max_epochs=module.recipe.epochs,
        logger=logger,
        callbacks=[checkpoints],
        plugins=WholeCheckpoints(),
        num_sanity_val_steps=0,
    )
    data = LessonDataModule(lessons, Collator(processor.tokenizer, size, TURN_TOKENS), module.recipe)
    trainer.fit(module, data, ckpt_path=checkpoints.last(trainer), weights_only=True)
