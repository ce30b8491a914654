"""The store returns exactly what was written, or names what is damaged."""

import json
import pickle
import resource
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from atr.core.files import sha256
from atr.features import store as module
from atr.features.store import FeatureStore, ShardWriter, clear_store, write_manifest

IMAGES, SHARD, TOKENS, WIDTH = 10, 4, 6, 8
PARAMETERS = {"encoder": "tiny", "layer": -2}
GONE = object()


def features(images=IMAGES):
    return torch.randn(images, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0)).bfloat16()


def ids(images=IMAGES):
    return [f"docs/{number:06d}" for number in range(images)]


def write(folder, batch=2, finish=True):
    """Write the store in batches that do not span shards."""
    clear_store(folder)
    writer = ShardWriter(folder, IMAGES, SHARD)
    for start in range(0, IMAGES, SHARD):
        for first in range(start, min(start + SHARD, IMAGES), batch):
            last = min(first + batch, start + SHARD, IMAGES)
            writer.add(first, ids()[first:last], features()[first:last])
    if finish:
        finish_store(folder, writer.shards)
    return folder


def finish_store(folder, shards):
    about = {"encoder": "tiny", "layer": -2, "grid": (2, 3), "width": WIDTH, "fingerprint": "0f"}
    about["preprocess"] = {"pixels": "ab"}
    write_manifest(folder, **about, parameters=PARAMETERS, shards=shards)


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "store")


@pytest.mark.parametrize("key", ["resolved", "preprocess"])
def test_the_error_for_an_older_store_names_the_stage_to_run_again(folder, key):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest.pop(key)
    path.write_text(json.dumps(manifest))
    with pytest.raises(
        ValueError, match=rf"manifest\.json: {key} is missing, .*: run the extract stage again$"
    ):
        FeatureStore.open(folder)


def test_round_trip_is_exact(folder):
    store = FeatureStore.open(folder, PARAMETERS)
    assert len(store) == IMAGES
    assert store.ids == ids()
    assert (store.grid, store.width) == ((2, 3), WIDTH)
    read = torch.stack([store[position] for position in range(IMAGES)])
    assert read.dtype == torch.bfloat16
    assert torch.equal(read, features())
    assert [store.index(name) for name in ids()] == list(range(IMAGES))


def test_float32_features_are_rounded_to_bfloat16(tmp_path):
    writer = ShardWriter(tmp_path, 1, SHARD)
    value = torch.full((1, TOKENS, WIDTH), 1 / 3)
    writer.add(0, ["a"], value)
    finish_store(tmp_path, writer.shards)
    assert torch.equal(FeatureStore.open(tmp_path)[0], value[0].bfloat16())


def test_bytes_do_not_depend_on_the_batches_or_the_order_of_the_shards(tmp_path):
    one = write(tmp_path / "one", batch=1)
    other = write(tmp_path / "other", batch=3)
    finish_store(other, FeatureStore.open(other).manifest["shards"][::-1])
    assert {file.name: file.read_bytes() for file in one.iterdir()} == {
        file.name: file.read_bytes() for file in other.iterdir()
    }


def test_the_manifest_describes_the_store(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    shards = manifest.pop("shards")
    assert manifest == {
        "format": "atr-features-1",
        "encoder": "tiny",
        "layer": -2,
        "dtype": "bfloat16",
        "tokens": 6,
        "grid": [2, 3],
        "width": WIDTH,
        "fingerprint": "0f",
        "preprocess": {"pixels": "ab"},
        "images": IMAGES,
        "parameters": PARAMETERS,
        "resolved": {},
    }
    assert [(shard["file"], shard["images"]) for shard in shards] == [
        ("shard-00000.safetensors", 4),
        ("shard-00001.safetensors", 4),
        ("shard-00002.safetensors", 2),
    ]


def test_invalid_indices_and_unknown_ids_are_refused(folder):
    store = FeatureStore.open(folder)
    for position in (*range(-IMAGES, 0), IMAGES):
        with pytest.raises(IndexError):
            store[position]
    with pytest.raises(ValueError, match=r"store: no features of image 'docs/999999'"):
        store.index("docs/999999")


def test_only_shards_that_are_read_are_mapped(folder):
    store = FeatureStore.open(folder)
    store[5]
    assert list(store._mapped) == [1]
    copy = pickle.loads(pickle.dumps(store))
    assert not copy._mapped
    assert torch.equal(copy[9], features()[9])


def test_an_unfinished_store_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"manifest\.json is missing: the store is not complete"):
        FeatureStore.open(write(tmp_path / "store", finish=False))


def test_a_new_extraction_removes_the_former_store(folder):
    clear_store(folder)
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    ("content", "pattern"),
    [
        ("{", r"manifest\.json is not valid JSON"),
        ("[" * 100_000, r"manifest\.json is not valid JSON"),
        ("[]", r"manifest\.json: \[\] is not allowed, allowed: a JSON object"),
        ('{"format": "atr-features-1"}', r"manifest\.json: encoder is missing, allowed: str"),
    ],
)
def test_an_invalid_manifest_is_refused(content, pattern, folder):
    (folder / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match=pattern):
        FeatureStore.open(folder)


def rewrite(folder, place, value):
    """Set or delete a value in the manifest."""
    manifest = json.loads((folder / "manifest.json").read_text())
    part = manifest
    for key in place[:-1]:
        part = part[key]
    if value is GONE:
        del part[place[-1]]
    else:
        part[place[-1]] = value
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("format",), "atr-features-0", "format: 'atr-features-0' is not allowed, allowed: atr-features-1"),
        (("encoder",), None, "encoder: None is not allowed, allowed: str"),
        (("layer",), "last", "layer: 'last' is not allowed, allowed: int"),
        (("dtype",), "float32", "dtype: 'float32' is not allowed, allowed: bfloat16"),
        (("preprocess",), [], r"preprocess: \[\] is not allowed, allowed: dict"),
        (("preprocess",), GONE, "preprocess is missing.*: run the extract stage again"),
        (("fingerprint",), "no hex", "fingerprint: 'no hex' is not allowed, allowed: up to 64 hex digits"),
        (("tokens",), 5, r"tokens: 5 is not allowed, allowed: the cells of grid \(2, 3\)"),
        (("tokens",), 6.0, "tokens: 6.0 is not allowed, allowed: int"),
        (("grid",), [6], r"grid: \[6\] is not allowed, allowed: tuple\[int, int\]"),
        (("grid",), [-2, -3], r"grid, width: \(-2, -3\), 8 are not allowed"),
        (("width",), 0, r"grid, width: \(2, 3\), 0 are not allowed"),
        (("parameters",), [], r"parameters: \[\] is not allowed, allowed: dict"),
        (("shards",), {}, r"shards: \{\} is not allowed, allowed: list"),
        (("shards",), [], "the shards do not sum to 10 images"),
        (("shards", 1), "shard-00001.safetensors", r"shards\[1\]: 'shard.* allowed: a JSON object"),
        (("shards", 1, "file"), "../other/shard", r"shards\[1\]: file: '\.\./other/.* allowed: a plain file"),
        (("shards", 1, "file"), "/etc/hostname", r"shards\[1\]: file: '/etc/hostname' is not allowed"),
        (("shards", 1, "file"), "..", r"shards\[1\]: file: '\.\.' is not allowed"),
        (("shards", 1, "file"), "sub\\shard", r"shards\[1\]: file: .* is not allowed"),
        (("shards", 1, "file"), "", r"shards\[1\]: file: '' is not allowed"),
        (("shards", 1, "file"), 5, r"shards\[1\]: file: 5 is not allowed, allowed: str"),
        (("shards", 1, "file"), "shard-00000.safetensors", "shards: 'shard-00000.safetensors' occurs twice"),
        (("shards", 1, "images"), "4", r"shards\[1\]: images: '4' is not allowed, allowed: int"),
        (("shards", 1, "images"), True, r"shards\[1\]: images: True is not allowed, allowed: int"),
        (("shards", 1, "images"), -4, r"shards\[1\]: images: -4 is not allowed, allowed: 1 and more"),
        (("shards", 1, "images"), 5, "the shards do not sum to 10 images"),
        (("shards", 1, "sha256"), "abc", r"shards\[1\]: sha256: 'abc' is not allowed"),
        (("shards", 1, "sha256"), GONE, r"shards\[1\]: sha256 is missing"),
        *(
            ((key,), GONE, f"{key} is missing")
            for key in ("format", "layer", "fingerprint", "grid", "shards")
        ),
    ],
)
@pytest.mark.parametrize("verify", [True, False])
def test_a_manifest_with_wrong_types_or_paths_outside_is_refused_by_key(
    folder, place, value, message, verify
):
    rewrite(folder, place, value)
    with pytest.raises(ValueError, match=rf"manifest\.json: {message}"):
        FeatureStore.open(folder, verify=verify)


def test_shards_of_unequal_sizes_are_refused(folder):
    for number, images in enumerate((4, 2, 4)):
        rewrite(folder, ("shards", number, "images"), images)
    with pytest.raises(
        ValueError, match=r"manifest\.json: shards: \[4, 2, 4\] images, allowed: equal counts"
    ):
        FeatureStore.open(folder)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({"ids": '["a", "b"]'}, r"shard-00001\.safetensors: has 2 image ids"),
        ({"ids": '"ab"'}, r"shard-00001\.safetensors: ids: 'ab' is not allowed, allowed: list"),
        (
            {"ids": '["a", 5, "c", "d"]'},
            r"shard-00001\.safetensors: ids\[1\]: 5 is not allowed, allowed: str",
        ),
        ({"ids": json.dumps(["a", "b", "docs/000000", "d"])}, "image ids: 'docs/000000' occurs twice"),
        ({"ids": "{"}, r"shard-00001\.safetensors: not a readable shard"),
        (None, r"shard-00001\.safetensors: not a readable shard"),
    ],
)
def test_invalid_ids_are_refused_before_features_are_read(folder, written, message, verify):
    shard = folder / "shard-00001.safetensors"
    save_file({"features": features(4)}, shard, written)
    rewrite(folder, ("shards", 1, "sha256"), sha256(shard))
    with pytest.raises(ValueError, match=message):
        FeatureStore.open(folder, verify=verify)


def test_a_linked_shard_is_read(folder, tmp_path):
    shard = folder / "shard-00001.safetensors"
    shard.rename(tmp_path / "cached")
    shard.symlink_to(tmp_path / "cached")
    assert torch.equal(FeatureStore.open(folder)[5], features()[5])


def test_a_manifest_whose_shards_do_not_sum_to_its_images_is_refused(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["images"] += 1
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="do not sum to 11 images"):
        FeatureStore.open(folder)


@pytest.mark.parametrize(("key", "value"), [("layer", -1), ("encoder", "clip"), ("precision", "32-true")])
def test_other_parameters_are_refused_by_name(key, value, folder):
    with pytest.raises(ValueError, match=rf"manifest\.json: {key} is .*, expected {value!r}"):
        FeatureStore.open(folder, PARAMETERS | {key: value})


def test_a_missing_shard_is_refused(folder):
    (folder / "shard-00001.safetensors").unlink()
    with pytest.raises(ValueError, match=r"shard-00001\.safetensors is missing"):
        FeatureStore.open(folder)


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-7], lambda data: data[:-7] + b"edited!", lambda _: b""]
)
def test_a_truncated_or_edited_shard_is_refused(damage, folder):
    shard = folder / "shard-00001.safetensors"
    shard.write_bytes(damage(shard.read_bytes()))
    with pytest.raises(ValueError, match=r"shard-00001\.safetensors differs from the manifest's checksum"):
        FeatureStore.open(folder)


def test_without_verification_an_edited_shard_is_accepted_unread(folder, monkeypatch):
    shard = folder / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-7] + b"edited!")
    monkeypatch.setattr(module, "sha256", lambda path: pytest.fail(f"{path} is read"))
    assert len(FeatureStore.open(folder, verify=False)) == IMAGES


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "longer", "of another shape"])
def test_without_verification_presence_size_and_shape_of_shards_are_checked(damage, folder):
    shard = folder / "shard-00002.safetensors"
    content = shard.read_bytes()
    if damage == "missing":
        shard.unlink()
    elif damage == "of another shape":
        save_file({"features": features(3)}, shard, {"ids": json.dumps(ids(3))})
    else:
        shard.write_bytes({"empty": b"", "cut": content[:-7], "longer": content + b"more"}[damage])
    with pytest.raises(ValueError, match=r"shard-00002\.safetensors"):
        FeatureStore.open(folder, verify=False)


@pytest.mark.parametrize("size", [0, 20, -7])
def test_a_shard_truncated_after_opening_is_named_when_read(size, folder):
    store = FeatureStore.open(folder, verify=False)
    shard = folder / "shard-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"shard-00002\.safetensors: not a readable shard"):
        store[9]
    with pytest.raises(ValueError, match=r"shard-00002\.safetensors: not a readable shard"):
        pickle.loads(pickle.dumps(store)).ids  # noqa: B018


def test_a_shard_of_another_shape_is_named_when_read(folder):
    store = FeatureStore.open(folder)
    shard = folder / "shard-00002.safetensors"
    save_file({"features": torch.zeros(2, 5, WIDTH).bfloat16()}, shard, metadata={"ids": '["a"]'})
    with pytest.raises(ValueError, match=r"shard-00002\.safetensors: features are \(2, 5, 8\)"):
        store[9]
    with pytest.raises(ValueError, match=r"shard-00002\.safetensors: has 1 image ids"):
        pickle.loads(pickle.dumps(store)).ids  # noqa: B018


@pytest.mark.parametrize("value", [torch.nan, -torch.inf, torch.finfo(torch.float32).max])
def test_features_that_are_not_finite_in_bfloat16_are_refused_by_image(tmp_path, value):
    broken = features(3).float()
    broken[1, 2, 3] = value
    with pytest.raises(ValueError, match="image docs/000001: the encoder's features are not finite"):
        ShardWriter(tmp_path, 3, SHARD).add(0, ids(3), broken)


@pytest.mark.parametrize("verify", [True, False])
def test_a_shard_of_another_dtype_or_with_too_many_ids_is_named(verify, folder):
    shard, manifest = folder / "shard-00002.safetensors", json.loads((folder / "manifest.json").read_text())
    for dtype, names in ((torch.float32, "ab"), (torch.bfloat16, "abc")):
        tensors = {"features": torch.zeros(2, TOKENS, WIDTH, dtype=dtype)}
        save_file(tensors, shard, metadata={"ids": json.dumps(list(names))})
        shards = [*manifest["shards"][:2], manifest["shards"][2] | {"sha256": sha256(shard)}]
        finish_store(folder, shards)
        with pytest.raises(ValueError, match=r"shard-00002\.safetensors"):
            store = FeatureStore.open(folder, verify=verify)
            assert len(store.ids) == IMAGES and store[9].dtype == torch.bfloat16


def test_the_manifest_of_a_former_store_is_removed_first(folder, monkeypatch):
    """So that an interruption never leaves a complete store."""
    gone, unlink = [], Path.unlink
    monkeypatch.setattr(
        Path, "unlink", lambda path, **options: gone.append(path.name) or unlink(path, **options)
    )
    clear_store(folder)
    assert gone[0] == "manifest.json" and len(gone) == 4


@contextmanager
def files_of_at_most(size):
    """Let the operating system refuse a write as a full disk would; Python ignores the signal with it.

    For no longer than the write in question: pytest's own output may be a file too.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_refused_write_leaves_no_file_and_names_the_shard(tmp_path):
    refusal = pytest.raises(OSError, match=r"shard-00000\.safetensors could not be written")
    with refusal, files_of_at_most(100):
        write(tmp_path / "store")
    assert not list((tmp_path / "store").iterdir())


def test_a_full_disk_leaves_complete_shards_and_no_manifest(tmp_path, monkeypatch):
    def fill_up(tensors, path, metadata):
        if "00001" in str(path):
            path.write_bytes(b"half a shard")
            raise module.SafetensorError("I/O error: No space left on device (os error 28)")
        save_file(tensors, path, metadata=metadata)

    monkeypatch.setattr(module, "save_file", fill_up)
    with pytest.raises(OSError, match=r"shard-00001\.safetensors could not be written: .*No space left"):
        write(tmp_path / "store")
    assert [file.name for file in (tmp_path / "store").iterdir()] == ["shard-00000.safetensors"]
    with pytest.raises(ValueError, match=r"manifest\.json is missing"):
        FeatureStore.open(tmp_path / "store")
