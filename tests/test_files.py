import errno
import json

import pytest

from atr import files


def test_json_is_the_same_for_equal_content(tmp_path):
    files.write_json(tmp_path / "a.json", {"b": 1, "a": [0.1, None]})
    files.write_json(tmp_path / "b.json", {"a": [0.1, None], "b": 1})
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert files.read_json(tmp_path / "a.json") == {"a": [0.1, None], "b": 1}


def test_not_a_number_is_no_result(tmp_path):
    with pytest.raises(ValueError):
        files.write_json(tmp_path / "a.json", {"score": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_old_file(tmp_path):
    path = tmp_path / "results.json"
    files.write_json(path, 1)
    expected = pytest.raises(OSError, match=r"results.json could not be written: No space left")
    with expected, files.whole_file(path) as temporary:
        temporary.write_text("half of")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert json.loads(path.read_text()) == 1
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_folder_leaves_the_old_one(tmp_path):
    with files.whole_folder(tmp_path / "store") as folder:
        (folder / "old").touch()
    with pytest.raises(KeyboardInterrupt), files.whole_folder(tmp_path / "store") as folder:
        (folder / "new").touch()
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["old"]


def test_a_new_folder_replaces_the_old_one(tmp_path):
    for name in ("old", "new"):
        with files.whole_folder(tmp_path / "store") as folder:
            (folder / name).touch()
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["new"]


@pytest.mark.parametrize("content", [b"{", b"\xff"])
def test_broken_json_is_named(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"a.json is not valid JSON"):
        files.read_json(tmp_path / "a.json")
    with pytest.raises(ValueError, match=r"b.json is missing"):
        files.read_json(tmp_path / "b.json")
