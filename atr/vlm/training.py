"""Training of the micro vision-language model: the tower learns to read, then the whole learns to answer."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from PIL.Image import Image
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerBase

from atr import config
from atr.vlm.micro import PATCH

CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
BLANK, OTHER = 0, 1
IGNORE = -100
TURN_TOKENS = 32
"""Room for the turns of an image; the longest, five lines of a page, take thirty."""


class Lesson(Protocol):
    """One image to learn from."""

    @property
    def image(self) -> Image:
        """RGB, of the size the tower takes."""

    @property
    def turns(self) -> tuple[tuple[str, str], ...]:
        """Questions and answers, in the order they are asked."""

    @property
    def characters(self) -> Sequence[tuple[str, float, float, str]]:
        """What is written: each character, its centre (x, y) in pixels, the question its line answers."""


class Draw(Protocol):
    """Draws lessons."""

    def __call__(self, index: int, *, reading: bool, transcribe: float) -> Lesson:
        """The lesson at `index`: to read from, or with questions, a part of them for the whole page."""


class LessonDataset(Dataset[Lesson]):
    """All lessons of a training: reading first, then questions; fewer are for a whole page later on."""

    def __init__(self, draw: Draw, recipe: config.Micro) -> None:
        self.draw, self.recipe = draw, recipe

    def __len__(self) -> int:
        return self.recipe.steps * self.recipe.batch_size

    def __getitem__(self, index: int) -> Lesson:
        step = index // self.recipe.batch_size
        transcribe = 0.4 if step < self.recipe.steps / 2 else 0.2
        return self.draw(index, reading=step < reading_steps(self.recipe), transcribe=transcribe)


def reading_steps(recipe: config.Micro) -> int:
    """Steps of the first phase, in which the tower alone learns to read."""
    return round(recipe.steps * recipe.reading)


class Stretch(Sampler[int]):
    """The lessons of one epoch, in order and each seen once: a resumed training goes on where it stopped."""

    def __init__(self, length: int) -> None:
        self.length, self.epoch = length, 0

    def set_epoch(self, epoch: int) -> None:
        """Lightning's hook, called before every epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.epoch * self.length, (self.epoch + 1) * self.length))


class Collator:
    """Turns lessons into a batch: uint8 images, token ids, answer labels, the characters in each patch."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, image_size: int, length: int) -> None:
        self.tokenizer, self.length, self.grid = tokenizer, length, image_size // PATCH

    def __call__(self, lessons: Sequence[Lesson]) -> dict[str, Tensor]:
        """Images (B, H, W, 3), text and labels (B, L), characters (B, N, 2), lines (B, N)."""
        text_BL = torch.full((len(lessons), self.length), self.tokenizer.pad_token_id)
        labels_BL = torch.full((len(lessons), self.length), IGNORE)
        for row, lesson in enumerate(lessons):
            ids, is_answer = self._tokens(lesson)
            text_BL[row, : len(ids)] = torch.tensor(ids)
            labels_BL[row, : len(ids)] = torch.where(torch.tensor(is_answer), torch.tensor(ids), IGNORE)
        return {
            "images": torch.from_numpy(np.stack([np.asarray(lesson.image) for lesson in lessons])),
            "text": text_BL,
            "labels": labels_BL,
            "characters": torch.stack([self._characters(lesson) for lesson in lessons]),
            "lines": torch.stack([self._lines(lesson) for lesson in lessons]),
        }

    def _tokens(self, lesson: Lesson) -> tuple[list[int], list[bool]]:
        ids: list[int] = []
        is_answer: list[bool] = []
        for question, answer in lesson.turns:
            asked = self.tokenizer(question, add_special_tokens=False).input_ids
            said = [*self.tokenizer(answer, add_special_tokens=False).input_ids, self.tokenizer.eos_token_id]
            ids += asked + said
            is_answer += [False] * len(asked) + [True] * len(said)
        assert len(ids) <= self.length, f"{len(ids)} tokens of turns, room for {self.length}"
        return ids, is_answer

    def _characters(self, lesson: Lesson) -> Tensor:
        """The first and the second character whose centre lies in each patch, from left to right: (N, 2)."""
        found = torch.full((self.grid * self.grid, 2), BLANK)
        for patch, character, _ in self._written(lesson):
            place = int((found[patch] != BLANK).sum())
            if place < 2:
                found[patch, place] = 2 + CHARACTERS.index(character) if character in CHARACTERS else OTHER
        return found

    def _lines(self, lesson: Lesson) -> Tensor:
        """The token of the question that the line in each patch answers, else padding: (N,)."""
        found = torch.full((self.grid * self.grid,), self.tokenizer.pad_token_id)
        for patch, _, question in self._written(lesson):
            (found[patch],) = self.tokenizer(question, add_special_tokens=False).input_ids
        return found

    def _written(self, lesson: Lesson) -> Iterator[tuple[int, str, str]]:
        """Patch, character and question of all that is written inside the image, from left to right."""
        for character, x, y, question in sorted(lesson.characters, key=lambda written: written[1]):
            row, column = int(y // PATCH), int(x // PATCH)
            if 0 <= row < self.grid and 0 <= column < self.grid:
                yield row * self.grid + column, character, question


class MicroTraining(lightning.LightningModule):
    """First the tower alone predicts the characters of each patch; then all of the model answers as well."""

    character_weights: Tensor
    line_weights: Tensor

    def __init__(
        self,
        model: LlavaForConditionalGeneration,
        recipe: config.Micro,
        examine: Callable[[LlavaForConditionalGeneration, str], float],
    ) -> None:
        """`examine` gives the model's score on validation questions of one benchmark."""
        super().__init__()
        self.model, self.recipe, self.examine = model, recipe, examine
        width = model.config.vision_config.hidden_size
        self.readers = nn.ModuleList(nn.Linear(width, 2 + len(CHARACTERS)) for _ in range(2))
        blanks_weigh_less = torch.ones(2 + len(CHARACTERS))
        blanks_weigh_less[BLANK] = 0.1
        self.register_buffer("character_weights", blanks_weigh_less, persistent=False)
        paddings_weigh_less = torch.ones(model.config.text_config.vocab_size)
        paddings_weigh_less[model.config.text_config.pad_token_id] = 0.1
        self.register_buffer("line_weights", paddings_weigh_less, persistent=False)
        if recipe.compile:
            model.model.vision_tower.compile()
            model.model.language_model.compile()

    def features(self, images_BHWC: Tensor) -> Tensor:
        """Patch features of the layer LLaVA reads, the class token dropped: (B, N, D)."""
        pixels_BCHW = images_BHWC.permute(0, 3, 1, 2) / 127.5 - 1
        features_BND: Tensor = self.model.model.vision_tower(pixels_BCHW).last_hidden_state[:, 1:]
        return features_BND

    def answer_logits(self, image_BND: Tensor, text_BL: Tensor) -> Tensor:
        """Logits of every text token, given `<s>`, the projected image, and the text before: (B, L, V)."""
        llava = self.model.model
        embed = llava.get_input_embeddings()
        start_B1D = embed(torch.full_like(text_BL[:, :1], self.model.config.text_config.bos_token_id))
        sequence = torch.cat([start_B1D, image_BND, embed(text_BL)], dim=1)
        hidden = llava.language_model(inputs_embeds=sequence, use_cache=False).last_hidden_state
        logits_BLV: Tensor = self.model.lm_head(hidden[:, image_BND.shape[1] : -1])
        return logits_BLV

    def reading_loss(self, features_BND: Tensor, characters_BN2: Tensor) -> Tensor:
        """Mean over the two character slots of the weighted cross-entropy."""
        losses = [
            functional.cross_entropy(
                reader(features_BND).flatten(0, 1), slot.flatten(), self.character_weights
            )
            for reader, slot in zip(self.readers, characters_BN2.unbind(-1), strict=True)
        ]
        return torch.stack(losses).mean()

    def finding_loss(self, image_BND: Tensor, lines_BN: Tensor) -> Tensor:
        """Weighted cross-entropy of each projected patch to the embedding of the question it answers.

        Without it the language model reads, but for long takes any line for the one it was asked for.
        """
        embedding_VD = self.model.get_input_embeddings().weight
        logits_BNV = functional.linear(functional.layer_norm(image_BND, image_BND.shape[-1:]), embedding_VD)
        return functional.cross_entropy(logits_BNV.flatten(0, 1), lines_BN.flatten(), self.line_weights)

    def training_step(self, batch: dict[str, Tensor], batch_index: int) -> Tensor:
        """The reading loss, and after the first phase the answering loss with it."""
        features_BND = self.features(batch["images"])
        reading = self.reading_loss(features_BND, batch["characters"])
        self.log("train/reading", reading, prog_bar=True)
        if self.global_step < reading_steps(self.recipe):
            return reading
        image_BND = self.model.model.multi_modal_projector(features_BND)
        answering = answer_loss(self.answer_logits(image_BND, batch["text"]), batch["labels"])
        finding = self.finding_loss(image_BND, batch["lines"])
        self.log_dict({"train/answering": answering, "train/finding": finding}, prog_bar=True)
        return answering + self.recipe.reading_weight * (reading + finding)

    def validation_step(self, benchmark: str, batch_index: int) -> None:
        """Log the score on one benchmark, once there are answers to be had."""
        if self.global_step > reading_steps(self.recipe):
            # Compiled kernels are left aside: generation meets a new shape at every step.
            with torch.compiler.set_stance("force_eager"):
                score = self.examine(self.model, benchmark)
            self.log(f"validation/{benchmark}", score, prog_bar=True, batch_size=1)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with the schedule of `_rate`."""
        recipe = self.recipe
        optimizer = torch.optim.AdamW(
            self.parameters(),
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


def answer_loss(logits_BLV: Tensor, labels_BL: Tensor) -> Tensor:
    """Cross-entropy averaged per sample, then over samples: long answers must not drown the short ones."""
    losses_BL = functional.cross_entropy(
        logits_BLV.transpose(1, 2).float(), labels_BL, ignore_index=IGNORE, reduction="none"
    )
    answers_BL = labels_BL != IGNORE
    return (losses_BL.sum(1) / answers_BL.sum(1)).mean()


class LessonDataModule(lightning.LightningDataModule):
    """Lessons to train on, and the benchmarks to be examined in after each epoch."""

    def __init__(self, draw: Draw, collate: Collator, recipe: config.Micro) -> None:
        super().__init__()
        self.draw, self.collate, self.recipe = draw, collate, recipe

    def train_dataloader(self) -> DataLoader[Lesson]:
        """One epoch's lessons in batches."""
        recipe = self.recipe
        dataset = LessonDataset(self.draw, recipe)
        return DataLoader(
            dataset,
            recipe.batch_size,
            sampler=Stretch(len(dataset) // recipe.epochs),
            collate_fn=self.collate,
            num_workers=recipe.workers,
        )

    def val_dataloader(self) -> DataLoader[str]:
        """The names of the benchmarks to be examined in."""
        return DataLoader(list(config.BENCHMARKS), batch_size=None)  # type: ignore[arg-type]  # a list will do


def train(
    module: MicroTraining,
    draw: Draw,
    processor: LlavaProcessor,
    checkpoint: Path,
    logger: Logger,
    trainer_kwargs: dict[str, Any],
) -> bool:
    """Train, or resume from `checkpoint`, which each epoch leaves; whether this is rank 0."""
    size = module.model.config.vision_config.image_size
    trainer = lightning.Trainer(
        **trainer_kwargs,
        max_epochs=module.recipe.epochs,
        logger=logger,
        callbacks=[
            ModelCheckpoint(
                checkpoint.parent,
                checkpoint.stem,
                save_on_train_epoch_end=True,
                enable_version_counter=False,
            )
        ],
        num_sanity_val_steps=0,
    )
    data = LessonDataModule(draw, Collator(processor.tokenizer, size, TURN_TOKENS), module.recipe)
    resume = checkpoint if checkpoint.exists() else None
    trainer.fit(module, data, ckpt_path=resume)
    return trainer.is_global_zero
