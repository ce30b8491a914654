import json
import os
from pathlib import Path

import pytest
from PIL import Image

from atr.datasets import PreparedImages, folder
from atr.datasets.prepared import save_images


@pytest.fixture
def pictures(tmp_path):
    for index in range(6):
        path = tmp_path / "deep" / f"{index}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("L", (9, 9), index).save(path)
    (tmp_path / "notes.txt").write_text("no picture")
    return tmp_path


def test_seeded_sample(pictures):
    first, again, other = (dict(folder.sample_pictures(pictures, 4, seed)) for seed in (0, 0, 1))
    assert list(first) == list(again) == sorted(first) and len(first) == 4
    assert list(first) != list(other)
    assert all(image.mode == "RGB" for image in first.values())


def test_all_of_them(pictures):
    assert [name for name, _ in folder.sample_pictures(pictures, 6, 0)] == [f"deep/{i}.png" for i in range(6)]


def test_too_few(pictures):
    with pytest.raises(ValueError, match=r"holds 6 pictures, prepare.images asks for 7"):
        list(folder.sample_pictures(pictures, 7, 0))


def test_corrupt_picture_is_named(pictures):
    path = pictures / "deep" / "3.png"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match=r"deep/3.png cannot be read as an image"):
        list(folder.sample_pictures(pictures, 6, 0))


def names(path, count):
    return [name for name, _ in folder.sample_pictures(path, count, 0)]


def picture(path, level=0):
    """A picture at a path, whatever bytes that is of."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        Image.new("L", (9, 9), level).save(file, "png")


@pytest.mark.parametrize(
    ("written", "name"),
    [
        (b"caf\xe9.png", r"deep/caf\udce9.png"),
        (b"two\nlines.png", r"deep/two\nlines.png"),
        (b"red\x1b[31m.png", r"deep/red\x1b[31m.png"),
        ("caf\u00e9 \u732b.png".encode(), "deep/caf\u00e9 \u732b.png"),
    ],
)
def test_a_name_of_any_bytes_is_read_and_can_be_written_and_printed(pictures, written, name):
    path = pictures / "deep" / os.fsdecode(written)
    picture(path, 77)
    found = dict(folder.sample_pictures(pictures, 7, 0))
    assert found[name].getpixel((0, 0)) == (77, 77, 77) and name.isprintable()
    assert json.loads(json.dumps(name, ensure_ascii=False).encode()) == name
    about = {"seed": 0, "prepare": {"source": "folder", "prompts": [], "split": "test"}}
    save_images(pictures / "prepared", found.items(), about)
    assert PreparedImages(pictures / "prepared").image(name).getpixel((0, 0)) == (77, 77, 77)
    path.write_bytes(b"no picture")
    with pytest.raises(ValueError, match="cannot be read as an image") as caught:
        names(pictures, 7)
    assert name in str(caught.value) and str(caught.value).isprintable()


def test_linked_folders_and_files_are_read(pictures, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    picture(other / "sub" / "a.png")
    (pictures / "linked").symlink_to(other)
    (pictures / "again.png").symlink_to(other / "sub" / "a.png")
    expected = ["again.png", *(f"deep/{number}.png" for number in range(6)), "linked/sub/a.png"]
    assert names(pictures, 8) == expected
    (pictures.parent / "whole").symlink_to(pictures)
    assert names(pictures.parent / "whole", 8) == expected


def test_links_that_go_round_and_links_to_what_is_there_add_nothing(pictures):
    (pictures / "deep" / "up").symlink_to(pictures)
    (pictures / "a").symlink_to(pictures / "deep")
    (pictures / "self").symlink_to(pictures / "self")
    assert names(pictures, 6) == [f"deep/{number}.png" for number in range(6)]
    with pytest.raises(ValueError, match="holds 6 pictures"):
        names(pictures, 7)


def test_a_link_to_nothing_is_named(pictures):
    (pictures / "gone.png").symlink_to(pictures / "nowhere.png")
    with pytest.raises(ValueError, match=r"gone\.png is a broken link, allowed"):
        names(pictures, 1)


def test_hidden_pictures_folders_named_so_and_pipes_are_none(pictures):
    for hidden in ("._0.png", ".hidden/0.png", "folder.png/.x.png"):
        picture(pictures / hidden)
    os.mkfifo(pictures / "pipe.png")
    picture(pictures / "deep" / "UPPER.PNG")
    assert names(pictures, 7) == [*(f"deep/{number}.png" for number in range(6)), "deep/UPPER.PNG"]


def test_a_folder_that_cannot_be_read_is_named(pictures, monkeypatch):
    scandir = os.scandir

    def failing(path):
        if Path(path).name == "deep":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", failing)
    with pytest.raises(OSError, match="deep"):
        names(pictures, 1)


def test_an_empty_file_is_named(pictures):
    (pictures / "deep" / "3.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"deep/3.png cannot be read as an image"):
        names(pictures, 6)
