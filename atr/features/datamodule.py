"""Data modules: images on their way into the store, features on their way out of it."""

from collections.abc import Iterator
from itertools import islice
from typing import Any, Protocol

import torch
from lightning.pytorch import LightningDataModule
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset

from atr.features.encoder import Preprocess
from atr.features.store import FeatureStore

ImageBatch = tuple[int, list[str], Tensor]  # index of the first image, ids, pixel_values_BCHW


class NamedImages(Protocol):
    """Anything that gives (id, picture) by index: prepared images, or a plain list."""

    def __len__(self) -> int:
        """Number of images."""

    def __getitem__(self, index: int, /) -> tuple[str, Image.Image]:
        """Image `index` and its id."""


class ShardBatches(Dataset[ImageBatch]):
    """One item is one whole batch of consecutive images; no batch straddles two shards."""

    def __init__(
        self, images: NamedImages, preprocess: Preprocess, batch_size: int, shard_images: int
    ) -> None:
        self.images = images
        self.preprocess = preprocess
        self.shard_images = shard_images
        self.spans = [
            range(first, min(first + batch_size, start + shard_images, len(images)))
            for start in range(0, len(images), shard_images)
            for first in range(start, min(start + shard_images, len(images)), batch_size)
        ]

    def __len__(self) -> int:
        """Number of batches."""
        return len(self.spans)

    def __getitem__(self, number: int) -> ImageBatch:
        """Batch `number`, read and preprocessed."""
        span = self.spans[number]
        ids, pictures = zip(*(self.images[index] for index in span), strict=True)
        return span.start, list(ids), self.preprocess(pictures)

    def of_rank(self, rank: int, world_size: int) -> list[int]:
        """Batches of shards rank, rank + world_size, ...: a shard is made of the same batches by any rank."""
        return [
            number
            for number, span in enumerate(self.spans)
            if span.start // self.shard_images % world_size == rank
        ]


class ImageDataModule(LightningDataModule):
    """Images for the predict loop; needs a Trainer with `use_distributed_sampler=False`."""

    def __init__(
        self,
        images: NamedImages,
        preprocess: Preprocess,
        batch_size: int,
        shard_images: int,
        workers: int = 0,
    ) -> None:
        super().__init__()
        # A rank has nothing to do where there are fewer shards than devices.
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self.batches = ShardBatches(images, preprocess, batch_size, shard_images)
        self.workers = workers

    def predict_dataloader(self) -> DataLoader[ImageBatch]:
        """The batches of this rank, in order."""
        mine = self.batches.of_rank(*_rank(self))
        return DataLoader(self.batches, batch_size=None, sampler=mine, num_workers=self.workers)


class EpochSampler(DistributedSampler[int]):
    """torch's epoch-seeded, rank-aware shuffle, able to begin at `start` images into the rank's share."""

    start = 0

    def __iter__(self) -> Iterator[int]:
        """The indices of this rank in this epoch."""
        return islice(super().__iter__(), self.start, None)


class ResumableLoader(DataLoader[Tensor]):
    """A loader whose state is the number of batches handed out in the running epoch.

    Lightning keeps that state in its checkpoints, so a run cut off inside an epoch goes on with the batches
    it has not seen. Iteration is a generator: nothing is drawn before the sampler has been told the epoch.
    """

    _resume_at = 0
    _handed_out = 0

    def __iter__(self) -> Iterator[Tensor]:  # type: ignore[override]
        """The batches of the epoch; after `load_state_dict` only those that are left of it, once."""
        assert isinstance(self.sampler, EpochSampler) and self.batch_size is not None
        self._handed_out, self._resume_at = self._resume_at, 0
        self.sampler.start = self._handed_out * self.batch_size
        for batch in super().__iter__():
            self._handed_out += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Batches handed out; a finished epoch counts as the beginning of the next."""
        return {"batches": self._handed_out % len(self)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Begin the next iteration where `state` was taken."""
        self._resume_at = state["batches"]


class FeatureDataModule(LightningDataModule):
    """Training and held-out images of a store as batches features_BND, float32 on the device.

    `training` and `validation` are lists of positions in the store, split by `seed` alone. The shuffle is
    over the whole store: an image's features lie together (1.2 MB for CLIP-L), so random reads cost a disk
    little more than sequential ones, and nothing more where the page cache holds the store.
    """

    def __init__(
        self, store: FeatureStore, batch_size: int, validation: float, seed: int, workers: int = 0
    ) -> None:
        super().__init__()
        self.store = store
        self.batch_size = batch_size
        self.seed = seed
        self.workers = workers
        order = torch.randperm(len(store), generator=torch.Generator().manual_seed(seed)).tolist()
        held_out = max(1, round(validation * len(store)))
        self.validation, self.training = order[:held_out], order[held_out:]

    def train_dataloader(self) -> DataLoader[Tensor]:
        """A new order every epoch; the last, incomplete batch is left out.

        Raises ValueError when there is not one batch for each device.
        """
        rank, world_size = _rank(self)
        dataset = Subset(self.store, self.training)
        if len(dataset) < self.batch_size * world_size:
            raise ValueError(
                f"{self.store.folder}: {len(dataset)} training images are fewer than one batch of "
                f"{self.batch_size} for each of {world_size} devices"
            )
        sampler = EpochSampler(dataset, world_size, rank, shuffle=True, seed=self.seed, drop_last=True)
        return ResumableLoader(dataset, sampler=sampler, drop_last=True, **self._loading())

    def val_dataloader(self) -> DataLoader[Tensor]:
        """The held-out images in a fixed order; over several devices some may repeat to come out even."""
        rank, world_size = _rank(self)
        dataset = Subset(self.store, self.validation)
        sampler = EpochSampler(dataset, world_size, rank, shuffle=False)
        return DataLoader(dataset, sampler=sampler, **self._loading())

    def on_after_batch_transfer(self, batch: Tensor, dataloader_idx: int) -> Tensor:
        """Widen to float32 only on the device: half the bytes to carry there."""
        return batch.float()

    def _loading(self) -> dict[str, Any]:
        return {
            "batch_size": self.batch_size,
            "num_workers": self.workers,
            "persistent_workers": self.workers > 0,
            "pin_memory": torch.cuda.is_available(),
        }


def _rank(module: LightningDataModule) -> tuple[int, int]:
    """(rank, world size); a data module used without a trainer is alone."""
    trainer = module.trainer
    return (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
