"""`atr reruns` on files, folders, and what is no file of the project."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from atr.cli import main as command
from atr.cli.reruns import rerun_lines

ROOT = Path(__file__).parents[2]


def test_a_folder_reruns_what_its_files_do(monkeypatch):
    monkeypatch.chdir(ROOT)
    [line] = rerun_lines(["atr/reduction/trained"])
    assert line.startswith(
        "atr/reduction/trained: evaluate-distilled, evaluate-selector, intrinsic-distilled"
    )


def test_a_file_outside_the_project_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ValueError, match=rf"^{tmp_path}: outside {ROOT}, allowed: a file of the project$"):
        rerun_lines([str(tmp_path)])


def test_outside_a_project_it_ends_with_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"^atr reruns: you are not inside of a DVC repository[^\n]*$"):
        command.main(["reruns"])


def test_a_list_of_cells_that_is_none_is_named(tmp_path, monkeypatch, capsys):
    """DVC would say that an object is not iterable."""
    text = (ROOT / "params.yaml").read_text()
    (tmp_path / "params.yaml").write_text(text.replace("own: []  # your own reducers", "own: mine  #"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        command.main(["reruns"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("atr reruns: evaluate.own: 'mine")


def test_importing_the_module_of_the_command_runs_nothing():
    """Scripts that were installed by former versions import it."""
    done = subprocess.run(
        [sys.executable, "-c", "import atr.__main__"],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
