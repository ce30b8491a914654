"""Training of the micro vision-language models: first they learn to see, then the whole learns to answer."""

import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import lightning
import torch
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    LlamaModel,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from atr.micro.curriculum import (
    BLANK,
    CHARACTERS,
    DIGITS,
    IGNORE,
    LONGEST_NUMBER,
    TURN_TOKENS,
    Collator,
    LessonDataModule,
    LessonDataset,
    StoredLessons,
    reading_steps,
)
from atr.micro.params import Recipe
from atr.reduction.checkpoints import Checkpoints, WholeCheckpoints

UNWRITTEN = 0.1
"""Weight of a patch without text, of which there are many, and all of a thing say the same."""


class Seen(NamedTuple):
    """What a tower makes of what it is shown: its features (B, N, D).

    Of one that learns also its states (B, N, D) behind two of its layers, which are to tell characters and
    names by then.
    """

    features_BND: Tensor
    read_BND: Tensor | None = None
    named_BND: Tensor | None = None


class MicroTraining(lightning.LightningModule):
    """First tower and projector learn what is in each patch; then all of the model answers as well.

    A tower that learns is to tell the characters, and then the names, behind layers in its midst too. A value
    can only look up whose value it is once its key is known: told at the end alone, keys are known at the
    end, and no layer is left to look them up.

    A frozen tower leaves all of that to the projector and the first `new_layers` layers of the language
    model; what is shown may then be stored features. There no patch knows of those after it, so that a value
    above its label bears no name. The label is to find it: each patch is to tell the digits that were written
    under its name before it.
    """

    def __init__(
        self,
        model: LlavaForConditionalGeneration,
        recipe: Recipe,
        examine: Callable[[LlavaForConditionalGeneration, str], float],
        see: Callable[[Tensor], Seen],
        new_layers: int = 0,
    ) -> None:
        """`examine` gives the model's score on one benchmark, `see` what the tower makes of what is shown."""
        super().__init__()
        self.model, self.recipe, self.examine, self.see = model, recipe, examine, see
        self.new_layers = new_layers
        self._seconds_before, self._started = 0.0, time.monotonic()
        # The backward of the fused attention is slow on a CPU: a step takes half as long again with it.
        model.set_attn_implementation("eager")
        vision, text = model.config.vision_config.hidden_size, model.config.text_config.hidden_size
        self.tower_learns = all(part.requires_grad for part in model.model.vision_tower.parameters())
        self.first_layers = _first_layers(model.model.language_model, new_layers)
        width = vision if self.tower_learns else text
        self.readers = nn.ModuleList(nn.Linear(width, 2 + len(CHARACTERS)) for _ in range(2))
        if self.tower_learns:
            self.namer = nn.Linear(vision, text)
        else:
            self.tellers = nn.ModuleList(nn.Linear(text, 1 + len(DIGITS)) for _ in range(LONGEST_NUMBER))
        if recipe.compile:
            model.model.vision_tower.compile()
            model.model.language_model.compile()

    def language(self, image_BND: Tensor, text_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, L, V) of every text token, given `<s>`, the projected image, and the text before it.

        Beside them what is to name the patches: their states (B, N, D) after `new_layers` layers.
        """
        llava, tokens, layer = self.model.model, image_BND.shape[1], self.new_layers
        sequence = self._sequence(image_BND, text_BL)
        states = llava.language_model(inputs_embeds=sequence, use_cache=False, output_hidden_states=layer > 0)
        logits_BLV: Tensor = self.model.lm_head(states.last_hidden_state[:, tokens:-1])
        return logits_BLV, states.hidden_states[layer][:, 1 : 1 + tokens] if layer else image_BND

    def named(self, image_BND: Tensor, text_BL: Tensor) -> Tensor:
        """What is to name the patches, as `language` has it, without the layers behind that."""
        sequence = self._sequence(image_BND, text_BL[:, :0])
        states_BND: Tensor = self.first_layers(inputs_embeds=sequence, use_cache=False).last_hidden_state
        return states_BND[:, 1:]

    def _sequence(self, image_BND: Tensor, text_BL: Tensor) -> Tensor:
        """Embedded `<s>`, the projected image and the text: (B, 1 + N + L, D)."""
        embed = self.model.get_input_embeddings()
        start_B1D = embed(text_BL.new_full((len(text_BL), 1), self.model.config.text_config.bos_token_id))
        return torch.cat([start_B1D, image_BND, embed(text_BL)], dim=1)

    def reading_loss(self, states_BND: Tensor, characters_BN2: Tensor) -> Tensor:
        """Cross-entropy of two heads on the states to the first two characters of each patch."""
        logits = [reader(_normed(states_BND)) for reader in self.readers]
        return _two_slots(logits, characters_BN2, torch.where(characters_BN2 == BLANK, UNWRITTEN, 1.0))

    def naming_loss(self, states_BND: Tensor, names_BN2: Tensor, written_BN: Tensor) -> Tensor:
        """Cross-entropy of each patch's state to the embeddings of the two names of what it shows.

        A patch of text is to name the question that its line answers, and its word. Without this loss the
        language model reads, but for long takes any line for the one it was asked for.
        """
        embedding_VD = self.model.get_input_embeddings().weight
        logits_BNV = functional.linear(_normed(states_BND), embedding_VD)
        weights_BN2 = torch.where(written_BN, 1.0, UNWRITTEN).unsqueeze(-1).expand_as(names_BN2)
        return _two_slots([logits_BNV] * 2, names_BN2, weights_BN2)

    def telling_loss(self, states_BND: Tensor, digits_BNS: Tensor) -> Tensor:
        """Cross-entropy of a head for each place of a number to the digits told by each patch of text.

        Zero where there is no text.
        """
        logits_BNSC = torch.stack([teller(_normed(states_BND)) for teller in self.tellers], dim=2)
        logits, digits = logits_BNSC.flatten(0, 2).float(), digits_BNS.flatten()
        total = functional.cross_entropy(logits, digits, ignore_index=IGNORE, reduction="sum")
        return total / (digits != IGNORE).sum().clamp(min=1)

    def patch_losses(
        self, seen: Seen, image_BND: Tensor, named_BND: Tensor, batch: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The reading and the naming loss, each the mean of all states that are to read and to name.

        Before a frozen tower the telling loss as well.
        """
        characters_BN2, reading, naming = batch["characters"], [image_BND], [named_BND]
        if self.tower_learns:
            assert seen.read_BND is not None and seen.named_BND is not None
            reading = [seen.read_BND, seen.features_BND]
            naming.append(self.namer(_normed(seen.named_BND)))
        written_BN = characters_BN2[..., 0] != BLANK
        read = [self.reading_loss(states_BND, characters_BN2) for states_BND in reading]
        named = [self.naming_loss(states_BND, batch["names"], written_BN) for states_BND in naming]
        losses = {"reading": torch.stack(read).mean(), "naming": torch.stack(named).mean()}
        if not self.tower_learns:
            losses["telling"] = self.telling_loss(named_BND, batch["digits"])
        return losses

    def training_step(self, batch: dict[str, Tensor], batch_index: int) -> Tensor:
        """The losses of the patches, and after the first phase those of the questions with them."""
        seen = self.see(batch["shown"])
        image_BND = self.model.model.multi_modal_projector(seen.features_BND)
        if self.global_step < reading_steps(self.recipe):
            losses = self.patch_losses(seen, image_BND, self.named(image_BND, batch["text"]), batch)
            loss = torch.stack([*losses.values()]).sum()
        else:
            logits_BLV, named_BND = self.language(image_BND, batch["text"])
            losses = self.patch_losses(seen, image_BND, named_BND, batch)
            answering = answer_loss(logits_BLV, batch["labels"])
            loss = answering + self.recipe.reading_weight * torch.stack([*losses.values()]).sum()
            losses["answering"] = answering
        self.log_dict({f"train/{name}": value for name, value in losses.items()}, prog_bar=True)
        return loss

    def validation_step(self, benchmark: str, batch_index: int) -> None:
        """Log the score on one benchmark, once there are answers to be had."""
        if self.global_step > reading_steps(self.recipe):
            # Compiled kernels are left aside: generation meets a new shape at every step.
            with torch.compiler.set_stance("force_eager"):
                score = self.examine(self.model, benchmark)
            self.log(f"validation/{benchmark}", score, prog_bar=True, batch_size=1)

    @property
    def seconds(self) -> float:
        """Seconds trained so far, in all sittings."""
        return self._seconds_before + time.monotonic() - self._started

    def on_fit_start(self) -> None:
        """Start the clock."""
        self._started = time.monotonic()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the time with the weights."""
        checkpoint["seconds"] = self.seconds

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on from the time of the sittings before."""
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
        """Clip: Lightning refuses to do it for a fused optimizer, and the others cost 5 % of a step here."""
        nn.utils.clip_grad_norm_(self.parameters(), 1.0)

    def _rate(self, step: int) -> float:
        """Linear warm-up, constant, then linear to 2 %."""
        recipe = self.recipe
        left = (recipe.steps - step) / (recipe.steps * (1 - recipe.constant))
        return min(1.0, (step + 1) / recipe.warmup_steps, max(0.02, left))


def tower_states(
    model: LlavaForConditionalGeneration, reading_layer: int, naming_layer: int, images_BHWC: Tensor
) -> Seen:
    """The patches behind the tower's last layer and two others, the class token dropped."""
    pixels_BCHW = images_BHWC.permute(0, 3, 1, 2) / 127.5 - 1
    states = model.model.vision_tower(pixels_BCHW, output_hidden_states=True).hidden_states
    return Seen(*(states[layer][:, 1:] for layer in (-1, reading_layer, naming_layer)))


def stored_states(standardise: Callable[[Tensor], Tensor], features_BND: Tensor) -> Seen:
    """Features that were stored, as a frozen tower gave them."""
    return Seen(standardise(features_BND))


def _first_layers(language: LlamaModel, count: int) -> LlamaModel:
    """A model of the first `count` layers of another, which it shares, and no norm behind them."""
    settings = deepcopy(language.config)
    settings.num_hidden_layers = count
    first = LlamaModel(settings)
    first.embed_tokens, first.layers, first.norm = (
        language.embed_tokens,
        language.layers[:count],
        nn.Identity(),
    )
    return first


def _normed(states_BND: Tensor) -> Tensor:
    """Neither tower nor projector ends in a norm, and features grow while they learn."""
    return functional.layer_norm(states_BND, states_BND.shape[-1:])


def _two_slots(logits: Sequence[Tensor], targets_BN2: Tensor, weights_BN2: Tensor) -> Tensor:
    """Mean over two slots of the weighted mean cross-entropy of logits_BNC."""
    losses_BN2 = torch.stack(
        [
            functional.cross_entropy(logits_BNC.transpose(1, 2).float(), target_BN, reduction="none")
            for logits_BNC, target_BN in zip(logits, targets_BN2.unbind(-1), strict=True)
        ],
        dim=-1,
    )
    return ((losses_BN2 * weights_BN2).sum((0, 1)) / weights_BN2.sum((0, 1))).mean()


def answer_loss(logits_BLV: Tensor, labels_BL: Tensor) -> Tensor:
    """Cross-entropy averaged per sample, then over samples: long answers must not drown the short ones."""
    losses_BL = functional.cross_entropy(
        logits_BLV.transpose(1, 2).float(), labels_BL, ignore_index=IGNORE, reduction="none"
    )
    answers_BL = labels_BL != IGNORE
    return (losses_BL.sum(1) / answers_BL.sum(1)).mean()


def train(
    module: MicroTraining,
    lessons: LessonDataset | StoredLessons,
    processor: LlavaProcessor,
    checkpoints: Checkpoints,
    logger: Logger,
    trainer_kwargs: dict[str, Any],
) -> None:
    """Train, going on from the last of `checkpoints` if there is one.

    On one device: a model this small gains nothing from more, and phases and lessons are counted in steps.
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
