"""The command as a user types it; `-X importtime` tells what was loaded."""

import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

from atr.cli import main as command

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "lightning", "transformers", "mlflow", "pandas", "sklearn", "matplotlib", "torchmetrics"}
NEXT = ROOT / "experiments/llava-next.yaml"


@pytest.fixture
def project(tmp_path, monkeypatch):
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    (tmp_path / "data").mkdir()
    (tmp_path / "data/micro").symlink_to(ROOT / "data/micro")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("arguments", [("plan",), ("overlay", str(NEXT)), ("--help",)])
def test_no_subcommand_loads_anything_heavy(project, arguments):
    run = [sys.executable, "-X", "importtime", "-m", "atr", *arguments]
    done = subprocess.run(
        run, cwd=project, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time")]
    assert len(lines) > 10, "the test reads the wrong output"
    assert not {line.rpartition("|")[2].strip().partition(".")[0] for line in lines} & HEAVY
    assert done.stdout


def test_plan_tells_the_costs_and_writes_nothing(project, capsys):
    before = sorted(project.rglob("*"))
    command.main(["plan"])
    out = capsys.readouterr()
    assert "to pretrain on (micro)" in out.out and "144 tokens of 192 channels" in out.out
    assert out.err == ""
    assert sorted(project.rglob("*")) == before


def test_what_does_not_fit_is_a_warning_and_no_refusal(project, capsys):
    command.main(["overlay", str(NEXT), "--set", "prepare.images=20"])
    command.main(["plan"])
    assert "warning: pretrain.batch_size: 19 images are fewer than one batch" in capsys.readouterr().err


def test_overlay_tells_what_it_changed(project, capsys):
    command.main(["overlay", str(NEXT), "--set", "trainer.devices=8", "--set", "trainer.strategy=ddp"])
    lines = capsys.readouterr().out.splitlines()
    assert "trainer.devices: 1 -> 8" in lines and "prepare.source: micro -> coco" in lines
    assert lines[-1] == f"params.yaml: {len(lines) - 1} values changed"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (
            ["overlay", str(NEXT), "--set", "pretrain.lr=1"],
            2,
            "atr overlay: pretrain.lr: 1 is an unknown key",
        ),
        (["overlay", "nowhere.yaml"], 2, "atr overlay: nowhere.yaml: no such file"),
        (["plan", "--params", "nowhere.yaml"], 2, "atr plan: nowhere.yaml: no such file"),
    ],
)
def test_wrong_parameters_end_with_2_and_one_line(project, capsys, arguments, code, message):
    with pytest.raises(SystemExit) as stop:
        command.main(arguments)
    err = capsys.readouterr().err
    assert stop.value.code == code
    assert err.startswith(message) and err.count("\n") == 1


def test_a_failed_write_ends_with_its_reason(project, monkeypatch):
    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(SystemExit, match=r"atr overlay: .*params\.yaml could not be written"):
        command.main(["overlay", str(NEXT)])


def test_the_installed_script_is_this_command():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, function = project["scripts"]["atr"].partition(":")
    assert getattr(import_module(module), function) is command.main
