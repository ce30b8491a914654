import json
import pickle
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from atr.core.files import sha256
from atr.datasets import PreparedImages, prepared
from atr.datasets.decoding import read_size

GONE = object()
PARAMETERS = {"seed": 3, "prepare": {"source": "micro", "prompts": [], "split": "test"}, "more": None}


def pictures(count, seed=0):
    rng = np.random.default_rng(seed)
    for index in range(count):
        yield f"docs/{index:06d}", Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(prepared, "_FILE_IMAGES", 40)
    prepared.save_images(tmp_path / "images", pictures(90), PARAMETERS)
    return tmp_path / "images"


def test_round_trip(folder):
    images = PreparedImages(folder)
    assert len(images) == 90 and images.parameters == PARAMETERS
    assert len(list(folder.glob("*.parquet"))) == 3
    for index, (name, picture) in enumerate(pictures(90)):
        found, image = images[index]
        assert (found, images.ids[index]) == (name, name)
        np.testing.assert_array_equal(np.asarray(image), np.asarray(picture))
        np.testing.assert_array_equal(np.asarray(images.image(name)), np.asarray(picture))
    assert [name for name, _ in images] == images.ids
    assert pickle.loads(pickle.dumps(images))[89][0] == "docs/000089"


def test_images_that_replace_others_are_the_ones_read(folder):
    former = PreparedImages(folder)[0][1].tobytes()
    prepared.save_images(folder, pictures(90, seed=1), PARAMETERS)
    assert PreparedImages(folder)[0][1].tobytes() != former


def test_unknown_image(folder):
    with pytest.raises(ValueError, match="no image docs/9"):
        PreparedImages(folder).image("docs/9")


def test_sizes_are_known_without_decoding(tmp_path):
    sizes = [(30, 20), (1, 1), (1, 3), (400, 2)]
    named = [(f"a/{place}", Image.new("RGB", size)) for place, size in enumerate(sizes)]
    prepared.save_images(tmp_path / "sizes", named, PARAMETERS)
    images = PreparedImages(tmp_path / "sizes")
    assert images.sizes() == [image.size for _, image in images] == sizes
    assert images.size("a/2") == (1, 3)
    with pytest.raises(ValueError, match="no image a/9"):
        images.size("a/9")


def test_the_size_of_what_is_no_image_is_refused_by_name():
    with pytest.raises(ValueError, match=r"^row 3 \(a/3\) cannot be read as an image: "):
        read_size(b"GIF", "row 3 (a/3)")


def test_missing_manifest(tmp_path):
    with pytest.raises(ValueError, match=r"manifest.json is missing; the stage prepare writes it"):
        PreparedImages(tmp_path)


def test_missing_file(folder):
    (folder / "images-00001.parquet").unlink()
    with pytest.raises(ValueError, match=r"images-00001.parquet is missing"):
        PreparedImages(folder)


@pytest.mark.parametrize("damage", [lambda b: b[:-10], lambda b: b[:50] + bytes([b[50] ^ 1]) + b[51:]])
def test_changed_file(folder, damage):
    path = folder / "images-00002.parquet"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"images-00002.parquet is not the file"):
        PreparedImages(folder)


def test_without_verifying_no_file_is_read_through_and_an_edited_one_is_taken(folder, monkeypatch):
    path = folder / "images-00002.parquet"
    content, middle = path.read_bytes(), path.stat().st_size // 2  # within an image
    path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    monkeypatch.setattr(prepared, "sha256", lambda path: pytest.fail(f"{path} is read"))
    images = PreparedImages(folder, verify=False)
    assert images.ids == [name for name, _ in pictures(90)]
    np.testing.assert_array_equal(np.asarray(images[0][1]), np.asarray(next(pictures(1))[1]))


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(b""), "is not the file"),
        (lambda path: path.write_bytes(path.read_bytes()[:-10]), "is not the file"),
        (lambda path: shutil.copy(path.with_name("images-00000.parquet"), path), "is not the file"),
    ],
)
def test_without_verifying_presence_and_number_of_images_of_every_file_are_checked(folder, damage, message):
    damage(folder / "images-00002.parquet")
    with pytest.raises(ValueError, match=f"images-00002.parquet {message}"):
        PreparedImages(folder, verify=False)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("format",), 2, "format: 2 is not allowed, allowed: 1"),
        (("format",), "1", "format: '1' is not allowed, allowed: int"),
        (("files",), GONE, "files is missing"),
        (("files", 1), [], r"files\[1\]: \[\] is not allowed, allowed: a JSON object"),
        (("files", 1, "file"), "../images-00001.parquet", r"files\[1\]: file: .* allowed: a plain file name"),
        (("files", 1, "file"), "/dev/null", r"files\[1\]: file: '/dev/null' is not allowed"),
        (("files", 1, "file"), "images-00000.parquet", "files: 'images-00000.parquet' occurs twice"),
        (("files", 1, "images"), 40.0, r"files\[1\]: images: 40.0 is not allowed, allowed: int"),
        (("files", 1, "images"), 0, r"files\[1\]: images: 0 is not allowed, allowed: 1 and more"),
        (("files", 1, "sha256"), None, r"files\[1\]: sha256: None is not allowed, allowed: str"),
        (("parameters",), [], r"parameters: \[\] is not allowed"),
        (("parameters", "seed"), "3", "parameters: seed: '3' is not allowed, allowed: int"),
        (("parameters", "prepare"), GONE, "parameters: prepare is missing"),
        (("parameters", "prepare", "source"), 3, "parameters: prepare: source: 3 is not allowed"),
    ],
)
def test_a_manifest_that_is_mistyped_or_leads_out_is_refused_by_key(folder, place, value, message):
    manifest = json.loads((folder / "manifest.json").read_text())
    part = manifest
    for key in place[:-1]:
        part = part[key]
    part.pop(place[-1]) if value is GONE else part.__setitem__(place[-1], value)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=rf"manifest\.json: {message}"):
        PreparedImages(folder)


def test_more_images_than_a_file_has_are_refused_before_they_are_counted_out(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][1]["images"] = 10**15
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"images-00001.parquet is not the file"):
        PreparedImages(folder)


@pytest.mark.parametrize(
    "table",
    [
        pa.table({"id": ["a", None], "image": [b"x", b"y"]}),
        pa.table({"id": ["a", "b"], "image": ["x", "y"]}),
        pa.table({"id": [1, 2], "image": [b"x", b"y"]}),
        pa.table({"id": ["a", "b"]}),
    ],
)
def test_a_table_of_other_columns_is_refused(folder, table):
    pq.write_table(table, folder / "images-00002.parquet")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][2] |= {"images": 2, "sha256": sha256(folder / "images-00002.parquet")}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"images-00002.parquet is not the file"):
        PreparedImages(folder)


def test_an_id_that_comes_twice_is_refused(tmp_path):
    twice = [("a", image) for _, image in pictures(2)]
    prepared.save_images(tmp_path, twice, PARAMETERS)
    with pytest.raises(ValueError, match=r"manifest\.json: image ids: 'a' occurs twice"):
        PreparedImages(tmp_path)


def test_corrupt_image_is_named(tmp_path, monkeypatch):
    def broken(images, *_):
        for name, _ in images:
            yield {"id": name, "image": b"\x89PNG\r\n\x1a\n and nothing more"}

    monkeypatch.setattr(prepared, "_encode", broken)
    prepared.save_images(tmp_path, pictures(2), PARAMETERS)
    with pytest.raises(ValueError, match=r"images-00000.parquet row 1 \(image docs/000001\) cannot be read"):
        PreparedImages(tmp_path)[1]


def test_a_source_that_fails_leaves_no_manifest(tmp_path):
    def failing():
        yield from pictures(3)
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        prepared.save_images(tmp_path / "images", failing(), PARAMETERS)
    with pytest.raises(ValueError, match="missing"):
        PreparedImages(tmp_path / "images")


def test_same_images_give_the_same_bytes(tmp_path):
    for name in "ab":
        prepared.save_images(tmp_path / name, pictures(40), PARAMETERS)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)
    assert pq.read_schema(tmp_path / "a" / "images-00000.parquet").names == ["id", "image"]
