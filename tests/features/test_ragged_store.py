"""A ragged store returns exactly what was written, or names what is damaged."""

import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from atr.core.files import sha256
from atr.features.store import FeatureStore, RaggedShardWriter, clear_store, write_manifest

GRIDS = [(2, 3), (1, 1), (7, 2), (1, 5), (3, 2), (2, 2), (4, 4)]
IMAGES, SHARD, WIDTH = len(GRIDS), 3, 4
IDS = [f"docs/{number:06d}" for number in range(IMAGES)]


def features():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(rows * columns, WIDTH, generator=generator).bfloat16() for rows, columns in GRIDS]


def write(folder, batch=2):
    """Write the store in batches that do not span shards."""
    clear_store(folder)
    writer = RaggedShardWriter(folder, IMAGES, SHARD)
    for start in range(0, IMAGES, SHARD):
        for first in range(start, min(start + SHARD, IMAGES), batch):
            part = slice(first, min(first + batch, start + SHARD, IMAGES))
            writer.add(first, IDS[part], features()[part], GRIDS[part])
    finish(folder, writer.shards)
    return folder


def finish(folder, shards):
    about = {"encoder": "qwen", "layer": "merged", "grid": None, "width": WIDTH}
    write_manifest(folder, **about, parameters={"encoder": "qwen"}, shards=shards)


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "store")


def test_round_trip_is_exact(folder):
    store = FeatureStore.open(folder, {"encoder": "qwen"})
    assert (len(store), store.ids, store.width, store.is_ragged) == (IMAGES, IDS, WIDTH, True)
    assert store.grids == GRIDS and [store.grid_of(place) for place in range(IMAGES)] == GRIDS
    for place, features_ND in enumerate(features()):
        assert store[place].dtype == torch.bfloat16 and torch.equal(store[place], features_ND)
    with pytest.raises(IndexError):
        store[IMAGES]


def test_its_typical_grid_is_that_of_the_median_image_and_it_has_no_one_grid(folder):
    store = FeatureStore.open(folder)
    assert store.typical_grid == (2, 3)  # of 1, 4, 5, 6, 6, 14 and 16 tokens
    with pytest.raises(ValueError, match=r"store: has no one grid, as its images have grids of their own$"):
        store.grid  # noqa: B018


def test_the_manifest_has_no_grid_and_says_the_tokens_of_each_shard(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["format"], manifest["layer"]) == ("atr-features-2", "merged")
    assert (manifest["grid"], manifest["tokens"], manifest["images"]) == (None, None, IMAGES)
    assert [(shard["images"], shard["tokens"]) for shard in manifest["shards"]] == [(3, 21), (3, 15), (1, 16)]


def test_shards_hold_features_one_after_another_and_grids(folder):
    tensors = load_file(folder / "shard-00001.safetensors")
    assert torch.equal(tensors["features"], torch.cat(features()[3:6]))
    assert tensors["grids"].dtype == torch.int64 and tensors["grids"].tolist() == [*map(list, GRIDS[3:6])]


def test_bytes_do_not_depend_on_the_batches_or_the_order_of_the_shards(tmp_path):
    one, other = write(tmp_path / "one", batch=1), write(tmp_path / "other", batch=3)
    finish(other, FeatureStore.open(other).manifest["shards"][::-1])
    assert {file.name: file.read_bytes() for file in one.iterdir()} == {
        file.name: file.read_bytes() for file in other.iterdir()
    }


def test_only_shards_that_are_read_are_mapped(folder):
    store = FeatureStore.open(folder)
    store[4]
    assert list(store._mapped) == [1]
    copy = pickle.loads(pickle.dumps(store))
    assert not copy._mapped
    assert torch.equal(copy[6], features()[6]) and copy.grid_of(6) == (4, 4)


def test_features_that_do_not_fit_their_grid_or_are_not_finite_are_refused_by_image(tmp_path):
    broken = features()[:3]
    broken[1] = torch.full_like(broken[1], torch.nan)
    writer = RaggedShardWriter(tmp_path, 3, SHARD)
    with pytest.raises(ValueError, match="image docs/000001: the encoder's features are not finite"):
        writer.add(0, IDS[:3], broken, GRIDS[:3])
    with pytest.raises(ValueError, match="image docs/000000: 6 features for a grid 2 x 4"):
        RaggedShardWriter(tmp_path, 3, SHARD).add(0, IDS[:3], features()[:3], [(2, 4), *GRIDS[1:3]])


def test_a_written_batch_is_not_held_for_one_of_its_images(tmp_path):
    """An encoder gives views of a batch, which a shard's buffer must not keep alive."""
    writer, batch = RaggedShardWriter(tmp_path, 3, SHARD), torch.zeros(1000, WIDTH).bfloat16()
    writer.add(0, IDS[:1], [batch[:6]], GRIDS[:1])
    assert writer._features[0].untyped_storage().nbytes() == 6 * WIDTH * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": [2, 3]}, r"grid: \(2, 3\) is not allowed, allowed: null in atr-features-2"),
        ({"format": "atr-features-1"}, "grid: None is not allowed, allowed: null in atr-features-2, rows"),
        ({"tokens": 6}, "tokens: 6 is not allowed, allowed: the cells of grid None"),
        ({"layer": "last"}, "layer: 'last' is not allowed, allowed: int, 'merged'"),
        ({"width": 0}, "grid, width: None, 0 are not allowed"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(folder, change, message):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=rf"manifest\.json: {message}.*: run the extract stage again$"):
        FeatureStore.open(folder)


@pytest.mark.parametrize("tokens", [None, 2, 0, -1])
def test_a_shard_without_its_tokens_is_refused(folder, tokens):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["shards"][1]["tokens"] = tokens
    path.write_text(json.dumps(manifest))
    with pytest.raises(
        ValueError, match=r"shard-00001\.safetensors: tokens: .* is not allowed, allowed: one"
    ):
        FeatureStore.open(folder)


def tensors(**changes):
    whole = {"features": torch.cat(features()[3:6]), "grids": torch.tensor(GRIDS[3:6])}
    return {name: value for name, value in (whole | changes).items() if value is not None}


DAMAGES = {
    "features cut": (tensors(features=torch.cat(features()[3:5])), r"features are \(11, 4\), .* \(15, 4\)"),
    "features of another type": (tensors(features=torch.zeros(15, WIDTH)), "features are"),
    "no features": (tensors(features=None), "not a readable shard"),
    "no grids": (tensors(grids=None), "not a readable shard"),
    "a grid missing": (
        tensors(grids=torch.tensor(GRIDS[3:5])),
        r"grids are \(2, 2\), the manifest says \(3, 2\)",
    ),
    "grids of another type": (tensors(grids=torch.tensor(GRIDS[3:6]).int()), "grids are"),
    "grids of other images": (
        tensors(grids=torch.tensor(GRIDS[:3])),
        "grids of 21 tokens, the manifest says 15",
    ),
    "grids of negative sides": (
        tensors(grids=torch.tensor([(-1, -5), (3, 2), (2, 2)])),
        "grids of 15 tokens",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("verify", [True, False])
def test_a_damaged_shard_is_named(folder, damage, verify):
    written, message = DAMAGES[damage]
    path, manifest = folder / "shard-00001.safetensors", json.loads((folder / "manifest.json").read_text())
    save_file(written, path, {"ids": json.dumps(IDS[3:6])})
    manifest["shards"][1]["sha256"] = sha256(path)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=rf"shard-00001\.safetensors: {message}"):
        FeatureStore.open(folder, verify=verify)


@pytest.mark.parametrize("cut", [lambda data: data[:-7], lambda data: data[:20], lambda _: b""])
def test_a_truncated_shard_is_named(folder, cut):
    path = folder / "shard-00002.safetensors"
    path.write_bytes(cut(path.read_bytes()))
    with pytest.raises(ValueError, match=r"shard-00002\.safetensors"):
        FeatureStore.open(folder)
    with pytest.raises(ValueError, match=r"shard-00002\.safetensors: not a readable shard"):
        FeatureStore.open(folder, verify=False)


def test_a_store_of_one_grid_has_the_same_grid_for_every_image(tmp_path):
    from atr.features.store import ShardWriter

    writer = ShardWriter(tmp_path, 2, 2)
    writer.add(0, ["a", "b"], torch.zeros(2, 6, WIDTH))
    about = {"encoder": "tiny", "layer": -2, "grid": (2, 3), "width": WIDTH}
    write_manifest(tmp_path, **about, parameters={}, shards=writer.shards)
    store = FeatureStore.open(tmp_path)
    assert (store.is_ragged, store.grids, store.typical_grid) == (False, [(2, 3)] * 2, (2, 3))
