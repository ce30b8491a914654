"""Batches of images: their order, split over ranks, epochs, and after a resume."""

from contextlib import suppress
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint
from PIL import Image
from torch import nn

from atr.core.ragged import RaggedFeatures
from atr.features.datamodule import FeatureDataModule, ShardBatches, TokenBatches
from atr.features.store import FeatureStore, RaggedShardWriter, ShardWriter, write_manifest


def numbered(images):
    """Images whose grey level is their index."""
    return [(f"image/{number}", Image.new("RGB", (2, 2), (number,) * 3)) for number in range(images)]


def levels(pictures):
    return torch.tensor([[picture.getpixel((0, 0))[0]] for picture in pictures])


def a_store(folder: Path, images: int) -> FeatureStore:
    """A store in which each feature is the index of its image."""
    writer = ShardWriter(folder, images, 8)
    for first in range(images):
        writer.add(first, [f"image/{first}"], torch.full((1, 2, 3), float(first)))
    write_manifest(
        folder, encoder="tiny", layer=-2, grid=(1, 2), width=3, parameters={}, shards=writer.shards
    )
    return FeatureStore.open(folder)


def a_ragged_store(folder: Path, grids) -> FeatureStore:
    """As `a_store`, in these grids."""
    writer = RaggedShardWriter(folder, len(grids), 8)
    for first, (rows, columns) in enumerate(grids):
        writer.add(
            first, [f"image/{first}"], [torch.full((rows * columns, 3), float(first))], [(rows, columns)]
        )
    write_manifest(
        folder, encoder="tiny", layer="merged", grid=None, width=3, parameters={}, shards=writer.shards
    )
    return FeatureStore.open(folder)


def sizes_of(images):
    """Grids of 1 to 60 tokens."""
    generator = torch.Generator().manual_seed(0)
    return [tuple(grid) for grid in torch.randint(1, 9, (images, 2), generator=generator).tolist()]


@pytest.fixture
def ragged(tmp_path):
    return a_ragged_store(tmp_path / "ragged", sizes_of(50))


@pytest.fixture
def store(tmp_path):
    return a_store(tmp_path / "store", 50)


@pytest.mark.parametrize(("images", "batch", "shard"), [(10, 2, 4), (10, 3, 4), (10, 64, 4), (3, 2, 100)])
def test_batches_are_consecutive_and_do_not_span_shards(images, batch, shard):
    batches = ShardBatches(numbered(images), levels, batch, shard)
    seen = []
    for first, ids, pixels in (batches[number] for number in range(len(batches))):
        assert first == len(seen)
        assert len(ids) <= batch
        assert first // shard == (first + len(ids) - 1) // shard
        assert [f"image/{level}" for level in pixels.flatten().tolist()] == ids
        seen += ids
    assert seen == [name for name, _ in numbered(images)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_ranks_share_whole_shards(world_size):
    batches = ShardBatches(numbered(10), levels, 3, 4)
    of_ranks = [batches.of_rank(rank, world_size) for rank in range(world_size)]
    assert sorted(chain(*of_ranks)) == list(range(len(batches)))
    shards = [{batches[number][0] // 4 for number in of_rank} for of_rank in of_ranks]
    assert shards == [set(range(rank, 3, world_size)) for rank in range(world_size)]


def drawn(loader, epoch):
    loader.sampler.set_epoch(epoch)
    return [images_of(batch) for batch in loader]


def images_of(batch):
    """The indices of a batch's images."""
    if isinstance(batch, RaggedFeatures):
        return [int(part[0, 0, 0]) for part in batch.grids.split(batch.features_1TD)]
    return batch[:, 0, 0].int().tolist()


def test_the_split_depends_on_the_seed_alone_and_covers_the_store(store):
    data = FeatureDataModule(store, 4, 0.2, seed=1)
    again = FeatureDataModule(store, 8, 0.2, seed=1)
    other = FeatureDataModule(store, 4, 0.2, seed=2)
    assert (data.validation, data.training) == (again.validation, again.training)
    assert data.validation != other.validation
    assert len(data.validation) == 10
    assert sorted(data.validation + data.training) == list(range(50))


def test_an_epoch_is_a_seeded_shuffle_of_the_training_images(store):
    data = FeatureDataModule(store, 4, 0.2, seed=1)
    first = drawn(data.train_dataloader(), 0)
    assert all(len(batch) == 4 for batch in first)
    assert sorted(chain(*first)) == sorted(data.training)
    assert first == drawn(data.train_dataloader(), 0)
    assert first != drawn(data.train_dataloader(), 1)


def test_the_order_of_an_epoch_depends_on_the_seed(store):
    orders = []
    for seed in (1, 2):
        data = FeatureDataModule(store, 4, 0.2, seed)
        orders.append([data.training.index(image) for image in chain(*drawn(data.train_dataloader(), 0))])
    assert orders[0] != orders[1]


def test_devices_on_several_machines_share_an_epoch(store):
    seen = []
    for rank in range(4):
        data = FeatureDataModule(store, 4, 0.2, seed=1)
        data.trainer = SimpleNamespace(global_rank=rank, local_rank=rank % 2, world_size=4)
        batches = drawn(data.train_dataloader(), 0)
        assert [len(batch) for batch in batches] == [4, 4]
        seen += chain(*batches)
    assert len(set(seen)) == len(seen) == 32 and set(seen) < set(data.training)


def test_validation_is_the_held_out_images_in_a_fixed_order(store):
    data = FeatureDataModule(store, 4, 0.2, seed=1)
    assert list(chain(*drawn(data.val_dataloader(), 0))) == data.validation
    assert list(chain(*drawn(data.val_dataloader(), 1))) == data.validation


@pytest.mark.parametrize("images", [1, 2, 4])
def test_too_few_images_are_refused(images, tmp_path):
    data = FeatureDataModule(a_store(tmp_path, images), 4, 0.2, seed=0)
    with pytest.raises(ValueError, match=r"training images are fewer than one batch of 4 for each of 1 dev"):
        data.train_dataloader()


def test_too_few_images_for_a_batch_of_each_device_are_refused(tmp_path):
    data = FeatureDataModule(a_store(tmp_path, 10), 3, 0.2, seed=0)
    data.trainer = SimpleNamespace(global_rank=0, local_rank=0, world_size=2)
    assert len(data.train_dataloader()) == 1
    data.trainer.world_size = 3
    with pytest.raises(
        ValueError, match=r"8 training images are fewer than one batch of 3 for each of 3 dev"
    ):
        data.train_dataloader()


def dtype_of(batch):
    return (batch.features_1TD if isinstance(batch, RaggedFeatures) else batch).dtype


class Recorder(LightningModule):
    """Records its training batches."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.seen: list[list[int]] = []

    def training_step(self, batch):
        assert dtype_of(batch) == torch.float32
        self.seen.append(images_of(batch))
        return self.weight.sum()

    def validation_step(self, batch):
        assert dtype_of(batch) == torch.float32

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class EpochCheckpoint(Checkpoint):
    """Writes a checkpoint after each epoch, as trainings of selectors do."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_epoch_end(self, trainer, module):
        trainer.save_checkpoint(self.folder / "last.ckpt")


class Interruption(Callback):
    """Interrupts training after a step, as a kill would."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            raise InterruptedError


def train(store, folder, callbacks=(), resume=None):
    module = Recorder()
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=3,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*callbacks, EpochCheckpoint(folder)],
    )
    data = FeatureDataModule(store, 4, 0.2, seed=1)
    with suppress(InterruptedError):
        trainer.fit(module, data, ckpt_path=resume, weights_only=True)
    return module.seen


@pytest.mark.parametrize(
    ("kind", "step"), [*(("store", step) for step in (10, 14, 20, 27)), ("ragged", 14), ("ragged", 20)]
)
def test_a_resumed_training_repeats_the_batches_since_the_last_epochs_checkpoint(
    kind, step, request, tmp_path
):
    store = request.getfixturevalue(kind)
    whole = train(store, tmp_path / "whole")
    before = train(store, tmp_path / "cut", [Interruption(step + 1)])
    after = train(store, tmp_path / "resumed", resume=tmp_path / "cut/last.ckpt")
    assert len(whole) == 30 and len({str(batches) for batches in whole}) == 30
    assert len(before) == step + 1
    assert before[: step // 10 * 10] + after == whole


def test_ragged_batches_hold_the_features_and_grids_of_their_images_and_nothing_else(ragged):
    for batch in FeatureDataModule(ragged, 4, 0.2, seed=1).train_dataloader():
        assert batch.grids.each == tuple(ragged.grid_of(place) for place in images_of(batch))
        whole = torch.cat([ragged[place] for place in images_of(batch)])
        assert batch.features_1TD.dtype == torch.bfloat16 and torch.equal(batch.features_1TD[0], whole)


def test_a_ragged_store_of_equal_grids_gives_the_batches_of_a_store_of_one(store, tmp_path):
    equal = a_ragged_store(tmp_path / "equal", [(1, 2)] * 50)
    for batch_size, epoch in ((4, 0), (4, 3), (7, 1), (40, 2)):
        modules = [FeatureDataModule(images, batch_size, 0.2, seed=1) for images in (store, equal)]
        for loader in ("train_dataloader", "val_dataloader"):
            one, other = (drawn(getattr(module, loader)(), epoch) for module in modules)
            assert one == other


def test_a_ragged_epoch_depends_on_seed_and_epoch_alone(ragged):
    data = FeatureDataModule(ragged, 4, 0.2, seed=1)
    loader = data.train_dataloader()
    first, second = drawn(loader, 0), drawn(loader, 1)
    assert first == drawn(data.train_dataloader(), 0) != second
    assert len(first) == len(second) == len(loader) == 10
    for batches in (first, second):
        seen = list(chain(*batches))
        assert len(set(seen)) == len(seen) and set(seen) <= set(data.training) and len(seen) > 36


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_take_turns_at_the_same_ragged_batches(ragged, world_size):
    alone = drawn(FeatureDataModule(ragged, 2, 0.2, seed=1).train_dataloader(), 5)
    of_ranks = []
    for rank in range(world_size):
        data = FeatureDataModule(ragged, 2, 0.2, seed=1)
        data.trainer = SimpleNamespace(global_rank=rank, world_size=world_size)
        of_ranks.append(drawn(data.train_dataloader(), 5))
        assert len(drawn(data.val_dataloader(), 0)) == -(-5 // world_size)
    assert [batch for turn in zip(*of_ranks, strict=True) for batch in turn] == alone[: 20 - 20 % world_size]


def test_ragged_validation_is_the_held_out_images_in_a_fixed_order(ragged):
    data = FeatureDataModule(ragged, 4, 0.2, seed=1)
    for epoch in (0, 1):
        assert list(chain(*drawn(data.val_dataloader(), epoch))) == data.validation


def test_too_few_ragged_images_are_refused(tmp_path):
    data = FeatureDataModule(a_ragged_store(tmp_path, [(1, 9), (1, 1), (2, 2)]), 4, 0.2, seed=0)
    with pytest.raises(ValueError, match="2 training images are fewer than one batch of 4 for each of 1 dev"):
        data.train_dataloader()


@given(
    tokens=st.lists(st.integers(1, 400), min_size=1, max_size=40),
    batch_size=st.integers(1, 10),
    seed=st.one_of(st.none(), st.integers(0, 9)),
    epoch=st.integers(0, 3),
)
@example(tokens=[1, 400, 400, 1, 1], batch_size=1, seed=None, epoch=0)
def test_batches_by_tokens_have_one_image_at_least_and_few_tokens_above_the_budget(
    tokens, batch_size, seed, epoch
):
    sampler = TokenBatches(tokens, batch_size, seed, 0, 1)
    sampler.set_epoch(epoch)
    batches = list(sampler)
    images = list(chain(*batches))
    assert len(batches) == len(sampler) and all(batches)
    assert len(batches) == (len(tokens) // batch_size if seed is not None else -(-len(tokens) // batch_size))
    assert len(set(images)) == len(images)
    if seed is None:
        assert images == list(range(len(tokens)))
    # Half an image may stand out on either side; more only where a batch would else have had no image.
    budget = batch_size * sum(tokens) / len(tokens)
    if max(tokens) <= budget:
        assert all(sum(tokens[index] for index in batch) <= budget + max(tokens) for batch in batches)
