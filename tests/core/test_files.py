import errno
import json
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from atr.core import files

ROOT = Path(__file__).parents[2]


def test_json_is_the_same_for_equal_content(tmp_path):
    files.write_json(tmp_path / "a.json", {"b": 1, "a": [0.1, None]})
    files.write_json(tmp_path / "b.json", {"a": [0.1, None], "b": 1})
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert files.read_json(tmp_path / "a.json") == {"a": [0.1, None], "b": 1}


def test_nan_is_refused(tmp_path):
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


def test_a_folder_is_there_while_its_former_content_is_removed(tmp_path, monkeypatch):
    """A kill during the slow removal of the former folder does not lose the new one."""
    store, remove = tmp_path / "store", files.shutil.rmtree

    def watched(path, *args, **kwargs):
        assert [file.name for file in store.iterdir()] == ["new"]
        remove(path, *args, **kwargs)

    with files.whole_folder(store) as folder:
        (folder / "old").touch()
    with files.whole_folder(store) as folder:
        (folder / "new").touch()
        monkeypatch.setattr(files.shutil, "rmtree", watched)
    assert list(tmp_path.iterdir()) == [store]


@pytest.mark.parametrize("content", [b"{", b"\xff"])
def test_broken_json_is_named(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"a.json is not valid JSON"):
        files.read_json(tmp_path / "a.json")
    with pytest.raises(ValueError, match=r"b.json is missing"):
        files.read_json(tmp_path / "b.json")


WRITES = """
import signal, sys
from pathlib import Path
from atr.core import files
with files.{kind}(Path("out")) as temporary:
    (temporary if "{kind}" == "whole_file" else temporary / "rows").write_text("half of")
    print("writing", flush=True)
    signal.pause()
"""


@pytest.fixture(params=["whole_file", "whole_folder"])
def writing(request, tmp_path):
    """A process in the middle of a write."""
    script = WRITES.format(kind=request.param)
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}){script}"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "writing\n"
        yield process
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGKILL)


def written(folder):
    return [
        path.read_text() for path in folder.glob(".*.part/**/*") if path.is_file() and path.name != ".lock"
    ]


def test_leftovers_of_a_killed_process_are_removed_by_the_next_write(tmp_path, writing):
    writing.send_signal(signal.SIGKILL)
    writing.wait()
    assert written(tmp_path) == ["half of"]
    files.write_text(tmp_path / "other", "whole")
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_a_write_in_progress_is_left_alone(tmp_path, writing):
    files.write_text(tmp_path / "other", "whole")
    with files.whole_folder(tmp_path / "store"):
        assert written(tmp_path) == ["half of"]
    assert written(tmp_path) == ["half of"]


def test_an_interrupted_removal_of_leftovers_is_completed(tmp_path, writing, monkeypatch):
    writing.send_signal(signal.SIGKILL)
    writing.wait()
    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr(files.shutil, "rmtree", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        files.write_text(tmp_path / "other", "whole")
    files.write_text(tmp_path / "other", "whole")
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_without_file_locks_writing_works_and_leftovers_stay(tmp_path, writing, monkeypatch):
    writing.send_signal(signal.SIGKILL)
    writing.wait()

    def refused(*_):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(files.fcntl, "flock", refused)
    files.write_text(tmp_path / "other", "whole")
    assert (tmp_path / "other").read_text() == "whole"
    assert written(tmp_path) == ["half of"]


def test_a_folders_digest_depends_on_the_names_and_contents_of_its_files(tmp_path):
    def known(pattern="*"):
        return files.folder_digest(tmp_path, pattern)

    digests = [known()]
    for name, content in [("a/b.py", "1"), ("a/b.py", "2"), ("a/c.txt", "2"), ("b.py", "2")]:
        files.write_text(tmp_path / name, content)
        digests.append(known())
    assert len({*digests}) == len(digests)
    code = known("*.py")
    files.write_text(tmp_path / "a/c.txt", "other")
    assert known("*.py") == code and known() != digests[-1]


def test_dvc_ignores_temporary_folders():
    """The report depends on the folder in which evaluations are written."""
    names = [f"experiments/evaluate/{name}" for name in (".random.x_1.part", "random/results.jsonl")]
    command = [sys.executable, "-m", "dvc", "check-ignore", *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines() == names[:1]
