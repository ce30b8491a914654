"""The order of the lessons that train the micro models: a reading phase, then an answering phase."""

from collections.abc import Callable, Iterator
from functools import lru_cache

import lightning
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from atr.features.store import FeatureStore
from atr.micro.drawing import Sample
from atr.micro.params import Recipe
from atr.micro.targets import Collator, LessonInput
from atr.micro.world import DRAW

DrawLesson = Callable[..., Sample]
"""`atr.micro.lessons.draw_lesson` with its seed bound: (index, *, reading, transcribe, again=0)."""


class LessonDataset(Dataset[LessonInput]):
    """All lessons of a training, each drawn once."""

    def __init__(self, draw: DrawLesson, recipe: Recipe) -> None:
        self.draw, self.recipe = draw, recipe

    def __len__(self) -> int:
        return self.recipe.steps * self.recipe.batch_size

    def __getitem__(self, index: int) -> LessonInput:
        step = index // self.recipe.batch_size
        reading = step < count_reading_steps(self.recipe)
        lesson = self.draw(index, reading=reading, transcribe=transcription_share(step, self.recipe))
        return torch.from_numpy(np.array(lesson.image)), lesson


class StoredLessons(Dataset[LessonInput]):
    """All lessons of a training on stored features, several passes over the store's images.

    The first `reading` images of the store are for the reading phase, the others for the answering phase.
    Each pass shuffles them anew and asks other questions.
    """

    def __init__(self, draw: DrawLesson, store: FeatureStore, reading: int, recipe: Recipe) -> None:
        self.draw, self.store, self.reading, self.recipe = draw, store, reading, recipe

    def __len__(self) -> int:
        return self.recipe.steps * self.recipe.batch_size

    def __getitem__(self, index: int) -> LessonInput:
        step, reading_steps = index // self.recipe.batch_size, count_reading_steps(self.recipe)
        reading = step < reading_steps
        images = range(self.reading) if reading else range(self.reading, len(self.store))
        first = 0 if reading else reading_steps * self.recipe.batch_size
        again, place = divmod(index - first, len(images))
        image = images[_shuffle(len(images), again)[place]]
        transcribe = transcription_share(step, self.recipe)
        lesson = self.draw(image, reading=reading, transcribe=transcribe, again=again)
        return self.store[image], lesson


@lru_cache(maxsize=2)
def _shuffle(length: int, seed: int) -> list[int]:
    order: list[int] = torch.randperm(length, generator=torch.Generator().manual_seed(seed)).tolist()
    return order


def count_reading_steps(recipe: Recipe) -> int:
    """Steps of the reading phase."""
    return round(recipe.steps * recipe.reading)


def transcription_share(step: int, recipe: Recipe) -> float:
    """Fraction of docs lessons at a step whose question asks for the whole page."""
    return 0.5 if step < recipe.steps / 2 else 0.15


class LessonSampler(Sampler[int]):
    """The lessons of one epoch in order, so that a resumed training continues with the next lesson."""

    def __init__(self, length: int, epoch: int = 0) -> None:
        self.length, self.epoch = length, epoch

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before every epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.epoch * self.length, (self.epoch + 1) * self.length))


class LessonDataModule(lightning.LightningDataModule):
    """Lessons for training, and benchmark names for the validation after each epoch."""

    def __init__(self, lessons: LessonDataset | StoredLessons, collate: Collator, recipe: Recipe) -> None:
        super().__init__()
        self.lessons, self.collate, self.recipe = lessons, collate, recipe

    def train_dataloader(self) -> DataLoader[LessonInput]:
        """Batches of one epoch's lessons."""
        recipe = self.recipe
        assert self.trainer
        # In a resumed training Lightning calls set_epoch only after workers have fetched their first lessons.
        epoch = self.trainer.fit_loop.epoch_progress.current.processed  # type: ignore[attr-defined]
        return DataLoader(
            self.lessons,
            recipe.batch_size,
            sampler=LessonSampler(len(self.lessons) // recipe.epochs, epoch),
            collate_fn=self.collate,
            num_workers=recipe.workers,
        )

    def val_dataloader(self) -> DataLoader[str]:
        """The names of the benchmarks."""
        return DataLoader(list(DRAW), batch_size=None)  # type: ignore[arg-type]  # a list is enough
