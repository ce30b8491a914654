"""Lessons of the micro vision-language models: images with their questions, in the order they are learned."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Protocol

import lightning
import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import PreTrainedTokenizerBase

from atr.config.prepare import MICRO_BENCHMARKS
from atr.micro.model import PATCH
from atr.micro.params import Recipe

CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
BLANK, OTHER = 0, 1
DIGITS, LONGEST_NUMBER = "0123456789", 4
IGNORE = -100
TURN_TOKENS = 36
"""Room for the turns of an image; the longest, six lines of a page with four digits each, take all of it."""


class Lesson(Protocol):
    """One image to learn from."""

    @property
    def image(self) -> Image:
        """RGB, of the size the tower takes."""

    @property
    def turns(self) -> tuple[tuple[str, str], ...]:
        """Questions and answers, in the order they are asked."""

    @property
    def characters(self) -> Sequence[tuple[str, float, float, tuple[str, str]]]:
        """What is written: each character, its centre (x, y) in pixels, the names of its line and word."""

    @property
    def regions(self) -> Sequence[tuple[tuple[str, str], tuple[float, float, float, float]]]:
        """What is to be seen: the two names of each thing, and its box in pixels; later ones lie in front."""


Shown = tuple[Tensor, Lesson]
"""What the model is shown of a lesson: its image, uint8 (H, W, 3), or the stored features of it, (N, D)."""


class Draw(Protocol):
    """Draws lessons."""

    def __call__(self, index: int, *, reading: bool, transcribe: float, again: int = 0) -> Lesson:
        """The lesson at `index`: to read from, or with questions, a part of them for the whole page.

        Where `again` is above 0 the same image is asked about anew.
        """


class Stored(Protocol):
    """What is read of a feature store."""

    def __len__(self) -> int:
        """Number of images."""

    def __getitem__(self, position: int, /) -> Tensor:
        """features_ND of one image."""


class LessonDataset(Dataset[Shown]):
    """All lessons of a training: reading first, then questions; fewer are for a whole page later on."""

    def __init__(self, draw: Draw, recipe: Recipe) -> None:
        self.draw, self.recipe = draw, recipe

    def __len__(self) -> int:
        return self.recipe.steps * self.recipe.batch_size

    def __getitem__(self, index: int) -> Shown:
        step = index // self.recipe.batch_size
        reading, transcribe = step < reading_steps(self.recipe), transcribed(step, self.recipe)
        lesson = self.draw(index, reading=reading, transcribe=transcribe)
        return torch.from_numpy(np.array(lesson.image)), lesson


class StoredLessons(Dataset[Shown]):
    """As LessonDataset, of images that were encoded once: the first `reading` of a store to read from.

    The others are asked about. Each pass over either is in an order of its own, and asks anew.
    """

    def __init__(self, draw: Draw, store: Stored, reading: int, recipe: Recipe) -> None:
        self.draw, self.store, self.reading, self.recipe = draw, store, reading, recipe

    def __len__(self) -> int:
        return self.recipe.steps * self.recipe.batch_size

    def __getitem__(self, index: int) -> Shown:
        step, before = index // self.recipe.batch_size, reading_steps(self.recipe)
        reading = step < before
        images = range(self.reading) if reading else range(self.reading, len(self.store))
        again, place = divmod(index if reading else index - before * self.recipe.batch_size, len(images))
        image = images[_order(len(images), again)[place]]
        lesson = self.draw(image, reading=reading, transcribe=transcribed(step, self.recipe), again=again)
        return self.store[image], lesson


@lru_cache(maxsize=2)
def _order(length: int, seed: int) -> list[int]:
    order: list[int] = torch.randperm(length, generator=torch.Generator().manual_seed(seed)).tolist()
    return order


def reading_steps(recipe: Recipe) -> int:
    """Steps of the first phase, in which what lies before the language model alone learns to read."""
    return round(recipe.steps * recipe.reading)


def transcribed(step: int, recipe: Recipe) -> float:
    """Fraction of the docs that ask for the whole page."""
    return 0.5 if step < recipe.steps / 2 else 0.15


class Stretch(Sampler[int]):
    """The lessons of one epoch, in order and each seen once: a resumed training goes on where it stopped."""

    def __init__(self, length: int, epoch: int = 0) -> None:
        self.length, self.epoch = length, epoch

    def set_epoch(self, epoch: int) -> None:
        """Lightning's hook, called before every epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.epoch * self.length, (self.epoch + 1) * self.length))


class Collator:
    """Turns lessons into a batch: what is shown, token ids, answer labels, what is in each patch."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, image_size: int, length: int) -> None:
        """`image_size` in pixels is that of the images the tower sees; lessons may be drawn at another."""
        self.tokenizer, self.length, self.grid = tokenizer, length, image_size // PATCH

    def __call__(self, shown: Sequence[Shown]) -> dict[str, Tensor]:
        """What is shown (B, ...), text, labels (B, L), characters, names (B, N, 2) and digits (B, N, 4)."""
        lessons = [lesson for _, lesson in shown]
        text_BL = torch.full((len(lessons), self.length), self.tokenizer.pad_token_id)
        labels_BL = torch.full_like(text_BL, IGNORE)
        for row, lesson in enumerate(lessons):
            ids, labels = self._tokens(lesson)
            text_BL[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
            labels_BL[row, : len(ids)] = torch.tensor(labels, dtype=torch.int64)
        return {
            "shown": torch.stack([what for what, _ in shown]),
            "text": text_BL,
            "labels": labels_BL,
            "characters": torch.stack([self.characters(lesson) for lesson in lessons]),
            "names": torch.stack([self._names(lesson) for lesson in lessons]),
            "digits": torch.stack([self._digits(lesson) for lesson in lessons]),
        }

    def _tokens(self, lesson: Lesson) -> tuple[list[int], list[int]]:
        """Ids of all turns, and the same as labels, of which only the answers are learned."""
        ids: list[int] = []
        labels: list[int] = []
        for question, answer in lesson.turns:
            asked = self.tokenizer(question, add_special_tokens=False).input_ids
            said = [*self.tokenizer(answer, add_special_tokens=False).input_ids, self.tokenizer.eos_token_id]
            ids += asked + said
            labels += [IGNORE] * len(asked) + said
        assert len(ids) <= self.length, f"{len(ids)} tokens of turns, room for {self.length}"
        return ids, labels

    def characters(self, lesson: Lesson) -> Tensor:
        """The first and the second character whose centre lies in each patch, from left to right: (N, 2)."""
        found = torch.full((self.grid * self.grid, 2), BLANK)
        for patch, character, _ in self._written(lesson):
            place = int((found[patch] != BLANK).sum())
            if place < 2:
                found[patch, place] = 2 + CHARACTERS.index(character) if character in CHARACTERS else OTHER
        return found

    def _names(self, lesson: Lesson) -> Tensor:
        """The tokens of the two names of what is in each patch, text before things, else padding: (N, 2)."""
        found = torch.full((self.grid, self.grid, 2), self.tokenizer.pad_token_id)
        patch_size = self._patch_size(lesson)
        for names, (left, top, right, bottom) in lesson.regions:
            # A patch shows the thing that its centre lies in.
            columns = slice(round(left / patch_size), round(right / patch_size))
            rows = slice(round(top / patch_size), round(bottom / patch_size))
            found[rows, columns] = self._name_tokens(names)
        found = found.flatten(0, 1)
        for patch, _, names in self._written(lesson):
            found[patch] = self._name_tokens(names)
        return found

    def _digits(self, lesson: Lesson) -> Tensor:
        """The digits under the name of a patch of text, up to its end in raster order: (N, 4), 0 for none."""
        found = torch.full((self.grid * self.grid, LONGEST_NUMBER), IGNORE)
        numbers: dict[str, str] = defaultdict(str)
        for patch, character, (name, _) in sorted(self._written(lesson), key=lambda written: written[0]):
            if character in DIGITS:
                numbers[name] += character
            told = [1 + DIGITS.index(digit) for digit in numbers[name][:LONGEST_NUMBER]]
            found[patch] = torch.tensor(told + [0] * (LONGEST_NUMBER - len(told)))
        return found

    def _name_tokens(self, names: tuple[str, str]) -> Tensor:
        return torch.tensor(self.tokenizer.convert_tokens_to_ids(list(names)))

    def _written(self, lesson: Lesson) -> Iterator[tuple[int, str, tuple[str, str]]]:
        """Patch, character and names of all that is written inside the image, from left to right."""
        patch_size = self._patch_size(lesson)
        for character, x, y, names in sorted(lesson.characters, key=lambda written: written[1]):
            row, column = int(y // patch_size), int(x // patch_size)
            if 0 <= row < self.grid and 0 <= column < self.grid:
                yield row * self.grid + column, character, names

    def _patch_size(self, lesson: Lesson) -> float:
        """Side of a patch in pixels of the lesson's image, which is resized to what the tower sees."""
        return lesson.image.width / self.grid


class LessonDataModule(lightning.LightningDataModule):
    """Lessons to train on, and the benchmarks to be examined in after each epoch."""

    def __init__(self, lessons: LessonDataset | StoredLessons, collate: Collator, recipe: Recipe) -> None:
        super().__init__()
        self.lessons, self.collate, self.recipe = lessons, collate, recipe

    def train_dataloader(self) -> DataLoader[Shown]:
        """One epoch's lessons in batches."""
        recipe = self.recipe
        assert self.trainer
        # Lightning tells the sampler of a resumed training only after workers have asked it for lessons.
        epoch = self.trainer.fit_loop.epoch_progress.current.processed  # type: ignore[attr-defined]
        return DataLoader(
            self.lessons,
            recipe.batch_size,
            sampler=Stretch(len(self.lessons) // recipe.epochs, epoch),
            collate_fn=self.collate,
            num_workers=recipe.workers,
        )

    def val_dataloader(self) -> DataLoader[str]:
        """The names of the benchmarks to be examined in."""
        return DataLoader(list(MICRO_BENCHMARKS), batch_size=None)  # type: ignore[arg-type]  # a list will do
