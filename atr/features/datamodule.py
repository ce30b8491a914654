"""Lightning data modules: images for extraction into a store, and stored features for training.

Shapes: see atr.core.tokens.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any, Protocol, TypeVar

import torch
from lightning.pytorch import LightningDataModule
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler, Subset

from atr.core.ragged import RaggedFeatures
from atr.core.threads import map_ahead
from atr.features.image_shapes import Preprocess, preprocess_named
from atr.features.store import FeatureStore

# Index of the first image, ids, and what `preprocess` gives: pixel_values_BCHW, or a dict of tensors.
ImageBatch = tuple[int, list[str], Any]
_Batch = TypeVar("_Batch", Tensor, RaggedFeatures)


class NamedImages(Protocol):
    """A sequence of (id, picture): prepared images, or a plain list."""

    def __len__(self) -> int:
        """Number of images."""

    def __getitem__(self, index: int, /) -> tuple[str, Image.Image]:
        """Id and picture of image `index`."""


class ShardBatches:
    """Each item is a whole batch of consecutive images; no batch spans two shards."""

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
        """Batch `number`, read and preprocessed; a ValueError of `preprocess` names the image."""
        span = self.spans[number]
        ids, pictures = zip(*(self.images[index] for index in span), strict=True)
        return span.start, list(ids), preprocess_named(self.preprocess, ids, pictures)

    def of_rank(self, rank: int, world_size: int) -> list[int]:
        """Batches of the shards rank, rank + world_size, ...; a shard has the same batches on any rank."""
        return [
            number
            for number, span in enumerate(self.spans)
            if span.start // self.shard_images % world_size == rank
        ]


class ImageLoader:
    """Some of the batches in order, read and preprocessed by threads while the encoder works on earlier ones.

    Threads suffice, as decoding, resizing and table look-ups release the interpreter's lock; processes would
    take a second to start, and copy every batch.
    """

    def __init__(self, batches: ShardBatches, numbers: Sequence[int], threads: int) -> None:
        self.batches = batches
        self.numbers = numbers
        self.threads = threads

    def __len__(self) -> int:
        """Number of batches."""
        return len(self.numbers)

    def __iter__(self) -> Iterator[ImageBatch]:
        """The batches; at most `threads` wait in memory."""
        return map_ahead(self._load, self.numbers, self.threads)

    def _load(self, number: int) -> ImageBatch:
        first, ids, inputs = self.batches[number]
        if not torch.cuda.is_available():
            return first, ids, inputs
        if isinstance(inputs, Tensor):
            return first, ids, inputs.pin_memory()
        return first, ids, {name: values.pin_memory() for name, values in inputs.items()}


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
        # With fewer shards than devices, some ranks have no batches.
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self.batches = ShardBatches(images, preprocess, batch_size, shard_images)
        self.workers = workers

    def predict_dataloader(self) -> ImageLoader:
        """The batches of this rank, in order."""
        return ImageLoader(self.batches, self.batches.of_rank(*_rank(self)), self.workers)


class FeatureDataModule(LightningDataModule):
    """Training and held-out images of a store as batches features_BND, float32 on the device.

    If the store is ragged, batches are RaggedFeatures of about equally many tokens, `batch_size` times the
    mean of the images, without padding.

    `training` and `validation` are lists of indices into the store; the split depends on `seed` alone. The
    whole store is shuffled: an image's features are contiguous (1.2 MB for CLIP-L), so random reads cost a
    disk little more than sequential ones, and nothing more once the store is in the page cache.

    There are no worker processes, as the store is memory-mapped. In a resumed training, workers would also
    start before Lightning has set the epoch, and read in the order of another epoch.
    """

    def __init__(self, store: FeatureStore, batch_size: int, validation: float, seed: int) -> None:
        """Any other sequence of features_ND may stand for a store that is not ragged."""
        super().__init__()
        self.store = store
        self.is_ragged = getattr(store, "is_ragged", False)
        self.batch_size = batch_size
        self.seed = seed
        order = torch.randperm(len(store), generator=torch.Generator().manual_seed(seed)).tolist()
        held_out = max(1, round(validation * len(store)))
        self.validation, self.training = order[:held_out], order[held_out:]

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled by seed and epoch, without the last, incomplete batch.

        Raises ValueError if there is less than one batch per device.
        """
        rank, world_size = _rank(self)
        dataset = Subset(self.store, self.training)
        if len(dataset) < self.batch_size * world_size:
            raise ValueError(
                f"{self.store.folder}: {len(dataset)} training images are fewer than one batch of "
                f"{self.batch_size} for each of {world_size} devices"
            )
        if self.is_ragged:
            return self._ragged_loader(self.training, self.seed)
        sampler: DistributedSampler[Tensor] = DistributedSampler(
            dataset, world_size, rank, shuffle=True, seed=self.seed, drop_last=True
        )
        return DataLoader(dataset, sampler=sampler, drop_last=True, **self._loading())

    def val_dataloader(self) -> DataLoader[Any]:
        """The held-out images in a fixed order; some repeat so that all devices have equally many.

        In a ragged store whole batches repeat.
        """
        if self.is_ragged:
            return self._ragged_loader(self.validation, seed=None)
        rank, world_size = _rank(self)
        dataset = Subset(self.store, self.validation)
        sampler: DistributedSampler[Tensor] = DistributedSampler(dataset, world_size, rank, shuffle=False)
        return DataLoader(dataset, sampler=sampler, **self._loading())

    def on_after_batch_transfer(self, batch: _Batch, dataloader_idx: int) -> _Batch:
        """Cast to float32 on the device: transferring bfloat16 halves the bytes."""
        return batch.float()

    def _loading(self) -> dict[str, Any]:
        return {"batch_size": self.batch_size, "pin_memory": torch.cuda.is_available()}

    def _ragged_loader(self, places: Sequence[int], seed: int | None) -> DataLoader[RaggedFeatures]:
        images = RaggedImages(self.store, places)
        # Lightning tells the sampler the epoch, so that it is the sampler that gives whole batches.
        batches = TokenBatches(images.tokens, self.batch_size, seed, *_rank(self))
        return DataLoader(images, **self._loading() | {"batch_size": None}, sampler=batches)


class RaggedImages(Dataset[RaggedFeatures]):
    """Some images of a ragged store; an index is the list of a batch's images."""

    def __init__(self, store: FeatureStore, places: Sequence[int]) -> None:
        self.store, self.places = store, places

    @property
    def tokens(self) -> list[int]:
        """Number of tokens of each image."""
        grids = (self.store.grid_of(place) for place in self.places)
        return [rows * columns for rows, columns in grids]

    def __getitem__(self, batch: Sequence[int]) -> RaggedFeatures:
        """Features of the images at these indices of `places`, bfloat16."""
        places = [self.places[index] for index in batch]
        return RaggedFeatures.of((self.store[place], self.store.grid_of(place)) for place in places)


class TokenBatches(Sampler[list[int]]):
    """Batches of about equally many tokens, of images in a shuffled order; those of one rank.

    `tokens` are the images' numbers of tokens; a batch has those of `batch_size` mean images, and one image
    at least. Batches are cut from the order of all ranks, which take turns, so that they do not depend on the
    number of ranks. With `seed` the order is shuffled by seed and epoch, and an incomplete batch at the end
    is dropped, as are batches that not all ranks would have; without, it is fixed and all images are given.
    """

    def __init__(
        self, tokens: Sequence[int], batch_size: int, seed: int | None, rank: int, world_size: int
    ) -> None:
        self.tokens = tokens
        self.seed = seed
        self.rank, self.world_size = rank, world_size
        self.epoch = 0
        self.budget = batch_size * sum(tokens) / len(tokens)
        self.batches = len(tokens) // batch_size if seed is not None else -(-len(tokens) // batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch; Lightning calls it."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Number of batches of a rank, the same for all."""
        if self.seed is not None:
            return self.batches // self.world_size
        return -(-self.batches // self.world_size)

    def __iter__(self) -> Iterator[list[int]]:
        """Indices of the images of each batch of this rank."""
        batches = self._cut(self._order())
        for step in range(len(self)):
            yield batches[(step * self.world_size + self.rank) % len(batches)]

    def _order(self) -> list[int]:
        if self.seed is None:
            return list(range(len(self.tokens)))
        # As torch's DistributedSampler draws it.
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return torch.randperm(len(self.tokens), generator=generator).tolist()

    def _cut(self, order: Sequence[int]) -> list[list[int]]:
        """Cut the order into `batches` parts where the tokens reach multiples of the budget.

        An image belongs to the part that holds its middle token. A cut moves where it would leave a batch
        without an image, as one larger than a batch does.
        """
        ends = list(accumulate(self.tokens[index] for index in order))
        middles = [end - self.tokens[index] / 2 for end, index in zip(ends, order, strict=True)]
        cuts = [0]
        for number in range(1, self.batches + 1):
            latest = len(order) - (self.batches - number)
            cut = bisect_left(middles, number * self.budget)
            cuts.append(min(max(cut, cuts[-1] + 1), latest))
        if self.seed is None:
            cuts[-1] = len(order)
        return [list(order[start:end]) for start, end in pairwise(cuts)]


def _rank(module: LightningDataModule) -> tuple[int, int]:
    """Rank and world size; (0, 1) without a trainer."""
    trainer = module.trainer
    return (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
