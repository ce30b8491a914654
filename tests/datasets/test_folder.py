import pytest
from PIL import Image

from atr.datasets import folder


@pytest.fixture
def pictures(tmp_path):
    for index in range(6):
        path = tmp_path / "deep" / f"{index}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("L", (9, 9), index).save(path)
    (tmp_path / "notes.txt").write_text("no picture")
    return tmp_path


def test_seeded_sample(pictures):
    first, again, other = (dict(folder.images(pictures, 4, seed)) for seed in (0, 0, 1))
    assert list(first) == list(again) == sorted(first) and len(first) == 4
    assert list(first) != list(other)
    assert all(image.mode == "RGB" for image in first.values())


def test_all_of_them(pictures):
    assert [name for name, _ in folder.images(pictures, 6, 0)] == [f"deep/{i}.png" for i in range(6)]


def test_too_few(pictures):
    with pytest.raises(ValueError, match=r"holds 6 pictures, prepare.images asks for 7"):
        list(folder.images(pictures, 7, 0))


def test_corrupt_picture_is_named(pictures):
    path = pictures / "deep" / "3.png"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match=r"deep/3.png cannot be read as an image"):
        list(folder.images(pictures, 6, 0))
