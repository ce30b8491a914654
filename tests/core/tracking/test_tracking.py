import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from atr import config
from atr.core import tracking
from atr.core.tracking import unlogged

ROOT = Path(__file__).parents[3]
RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID")


def test_the_stages_of_a_pipeline_share_a_parent_with_all_parameters(find, request):
    for stage, part in (("extract", "pretrain"), ("extract", "evaluate"), ("prepare", "")):
        with tracking.run(stage, config.load(stage), part):
            pass
    parent = find(f"pipeline-{request.node.name}")
    children = [find(name) for name in ("prepare", "extract/pretrain", "extract/evaluate")]
    assert {child.data.tags["mlflow.parentRunId"] for child in children} == {parent.info.run_id}
    assert parent.data.params == {key: str(value) for key, value in config.flat().items()}
    assert {run.info.status for run in (parent, *children)} == {"FINISHED"}


def test_a_stage_logs_the_parameters_it_declared_and_its_tags(find, request):
    params = config.load("extract")
    with tracking.run("extract", params):
        assert find("extract").info.status == "RUNNING"
        assert find(f"pipeline-{request.node.name}").info.status == "RUNNING"
    run = find("extract")
    assert run.data.params == {key: str(value) for key, value in params.flat().items()}
    assert {"encoder", "extract.layer", "trainer.devices"} < set(run.data.params)
    tags = {"stage": "extract", "encoder": "micro", "vlm": "micro", "pipeline": request.node.name}
    assert tags.items() <= run.data.tags.items()


def test_metrics_keep_their_steps_and_results_reach_the_parent(find, folder, request):
    with tracking.run("pretrain", config.load("pretrain")) as run:
        for step in range(3):
            run.metrics({"loss": 1 / (step + 1)}, step)
        run.metrics({"kept": 0.3})
    logged = find("pretrain")
    history = MlflowClient(f"sqlite:///{folder}/experiments/mlflow.db").get_metric_history(
        logged.info.run_id, "loss"
    )
    assert [(point.step, point.value) for point in history] == [(0, 1.0), (1, 1 / 2), (2, 1 / 3)]
    assert logged.data.metrics["kept"] == 0.3
    assert find(f"pipeline-{request.node.name}").data.metrics == {"pretrain/kept": 0.3}


def test_files_and_folders_are_logged_as_artifacts(find, tmp_path):
    (tmp_path / "masks").mkdir()
    for name in ("masks/0.png", "summary.json"):
        (tmp_path / name).write_text(name)
    with tracking.run("report", config.load("report")) as run:
        run.artifact(tmp_path / "summary.json")
        run.artifact(tmp_path / "masks", folder="pictures")
    stored = Path(find("report").info.artifact_uri.removeprefix("file://"))
    assert (stored / "summary.json").read_text() == "summary.json"
    assert (stored / "pictures/0.png").read_text() == "masks/0.png"


def test_the_lightning_logger_writes_to_the_run(find):
    with tracking.run("pretrain", config.load("pretrain")) as run:
        run.logger().log_metrics({"train/loss": 0.5}, step=7)
        run.logger().finalize("success")
    assert find("pretrain").data.metrics == {"train/loss": 0.5}


@pytest.mark.parametrize(
    ("error", "status"),
    [(ValueError, "FAILED"), (OSError, "FAILED"), (KeyboardInterrupt, "KILLED"), (SystemExit, "KILLED")],
)
def test_a_stage_that_stops_ends_its_run_and_its_parent(find, request, error, status):
    with pytest.raises(error), tracking.run("prepare", config.load("prepare")):
        raise error
    assert find("prepare").info.status == find(f"pipeline-{request.node.name}").info.status == status


def test_sigterm_ends_the_run_as_killed(find, folder):
    script = """
import os, signal
from atr import config
from atr.core import tracking
from atr.stages import entry
def main(params):
    with tracking.run("report", params):
        os.kill(os.getpid(), signal.SIGTERM)
entry("report", main)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, env=environment)
    assert done.returncode == 128 + signal.SIGTERM
    assert find("report").info.status == "KILLED"


def log_cell(values=()):
    """A short cell: a result, a curve and an artifact that is changed later."""
    Path("summary.json").write_text("of the cell")
    with tracking.run("intrinsic", config.load("intrinsic"), "random") as run:
        run.metrics({"kept": 0.3})
        run.metrics({"overlap": 0.5}, step=40)
        run.artifact("summary.json")
        for error in values:
            raise error
    Path("summary.json").write_text("of another run")


def check_cell(find, pipeline, status="FINISHED"):
    run = find("intrinsic/random", pipeline)
    assert run.data.metrics == {"kept": 0.3, "overlap": 0.5}
    assert run.data.params == {key: str(value) for key, value in config.load("intrinsic").flat().items()}
    assert run.info.status == status and run.info.start_time <= run.info.end_time
    parent = find(f"pipeline-{pipeline}", pipeline)
    assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert parent.data.metrics == {"intrinsic/random/kept": 0.3}
    stored = Path(run.info.artifact_uri.removeprefix("file://"))
    assert (stored / "summary.json").read_text() == "of the cell"


def test_a_short_cell_is_sent_by_the_next_stage_that_is_none(find, request, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(tracking.store, "connect", lambda: pytest.fail("a short cell connects to MLflow"))
        log_cell()
    assert len(unlogged.pending_folders()) == 1
    with tracking.run("report", config.load("report")):
        assert len(unlogged.pending_folders()) == 1
    assert unlogged.pending_folders() == []
    check_cell(find, request.node.name)


def test_a_cell_that_takes_long_or_fails_is_sent_at_its_end(find, request, monkeypatch):
    with pytest.raises(ZeroDivisionError):
        log_cell([ZeroDivisionError()])
    check_cell(find, request.node.name, "FAILED")
    monkeypatch.setenv("ATR_PIPELINE", "long")
    monkeypatch.setattr(tracking, "LONG_SECONDS", -1)
    log_cell()
    check_cell(find, "long")
    assert unlogged.pending_folders() == []


def test_a_cell_whose_sending_breaks_off_is_one_run_in_the_end(find, request, monkeypatch, capsys):
    log_cell()
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_artifacts", lambda *_: 1 / 0)
        with tracking.run("report", config.load("report")):
            pass
    (folder,) = unlogged.pending_folders()
    assert capsys.readouterr().err == f"atr: {folder} could not be logged: division by zero\n"
    with tracking.run("report", config.load("report")):
        pass
    check_cell(find, request.node.name)


def test_a_cell_does_not_fail_with_its_log(monkeypatch, tmp_path, capsys):
    (tmp_path / "params.yaml").write_text(Path("params.yaml").read_text())
    (tmp_path / "experiments").write_text("a file in its place")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tracking, "LONG_SECONDS", -1)
    log_cell()
    lines = capsys.readouterr().err.splitlines()
    assert "its log is not saved" in lines[0] and "cannot be written" in lines[1] and len(lines) == 2


@pytest.mark.parametrize("rank", RANKS)
def test_the_other_processes_of_a_stage_log_nothing(tmp_path, monkeypatch, rank):
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(rank, "1")
    with tracking.run("prepare", config.load("prepare")) as run:
        run.metrics({"loss": 1.0}, step=1)
        run.artifact("params.yaml")
        run.logger().log_metrics({"loss": 1.0}, step=1)
    assert [path.name for path in tmp_path.iterdir()] == ["params.yaml"]


PRINT_ID = "from atr.core import tracking; print(tracking._pipeline_id())"


def ids_under(tmp_path: Path, command: list[str]) -> list[str]:
    """Pipeline ids of two processes that `command` starts in sequence."""
    script = (
        f"import subprocess, sys\nfor _ in range(2): subprocess.run([sys.executable, '-c', {PRINT_ID!r}])\n"
    )
    for name in ("dvc", "other"):
        (tmp_path / name).write_text(script)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("ATR_PIPELINE")
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_the_pipeline_is_the_dvc_process_above(tmp_path):
    first = ids_under(tmp_path, [sys.executable, "dvc", "repro"])
    second = ids_under(tmp_path, [sys.executable, str(tmp_path / "dvc"), "exp", "run"])
    assert len(first) == len(second) == 2
    assert len({*first}) == len({*second}) == 1 and first != second
    assert len({*ids_under(tmp_path, [sys.executable, "other", "repro"])}) == 2


def test_commit_and_dirty_tree_are_logged(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert tracking._git_tags() == {}
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@t"]
    (tmp_path / "code.py").write_text("")
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *command], check=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert tracking._git_tags() == {"git_commit": head, "git_dirty": "false"}
    for output in ("dvc.lock", "experiments/summary.json"):
        (tmp_path / output).parent.mkdir(exist_ok=True)
        (tmp_path / output).write_text("{}")
    assert tracking._git_tags()["git_dirty"] == "false"
    (tmp_path / "code.py").write_text("changed")
    assert tracking._git_tags()["git_dirty"] == "true"
    assert tracking.current_provenance()["commit"] == head


def test_provenance_needs_no_heavy_imports():
    script = (
        "import sys; from atr.core import tracking; print(sorted(tracking.current_provenance()['versions']));"
        "print({'torch', 'mlflow', 'lightning', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "['atr', 'lightning', 'torch', 'transformers']\nset()\n"
