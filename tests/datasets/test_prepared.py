import pickle
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from atr.datasets import PreparedImages, prepared


def pictures(count, seed=0):
    rng = np.random.default_rng(seed)
    for index in range(count):
        yield f"docs/{index:06d}", Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(prepared, "FILE_IMAGES", 40)
    prepared.save_images(tmp_path / "images", pictures(90), {"seed": 3})
    return tmp_path / "images"


def test_round_trip(folder):
    images = PreparedImages(folder)
    assert len(images) == 90 and images.parameters == {"seed": 3}
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
    prepared.save_images(folder, pictures(90, seed=1), {})
    assert PreparedImages(folder)[0][1].tobytes() != former


def test_unknown_image(folder):
    with pytest.raises(ValueError, match="no image docs/9"):
        PreparedImages(folder).image("docs/9")


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


def test_corrupt_image_is_named(tmp_path, monkeypatch):
    def broken(images):
        for name, _ in images:
            yield {"id": name, "image": b"\x89PNG\r\n\x1a\n and nothing more"}

    monkeypatch.setattr(prepared, "_encoded", broken)
    prepared.save_images(tmp_path, pictures(2), {})
    with pytest.raises(ValueError, match=r"images-00000.parquet row 1 \(image docs/000001\) cannot be read"):
        PreparedImages(tmp_path)[1]


def test_a_source_that_fails_leaves_no_manifest(tmp_path):
    def failing():
        yield from pictures(3)
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        prepared.save_images(tmp_path / "images", failing(), {})
    with pytest.raises(ValueError, match="missing"):
        PreparedImages(tmp_path / "images")


def test_same_images_give_the_same_bytes(tmp_path):
    for name in "ab":
        prepared.save_images(tmp_path / name, pictures(40), {"seed": 0})
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)
    assert pq.read_schema(tmp_path / "a" / "images-00000.parquet").names == ["id", "image"]
