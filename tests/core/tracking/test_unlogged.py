import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from atr import config
from atr.core import tracking
from atr.core.tracking import __main__ as command
from atr.core.tracking import store, unlogged

CALLS = ("log_batch", "log_artifact", "log_artifacts", "set_terminated")


@pytest.fixture(autouse=True)
def project(tmp_path, folder, monkeypatch, capsys):
    """A separate project as working directory."""
    (tmp_path / "experiments").mkdir()
    shutil.copy(folder / "params.yaml", tmp_path)
    shutil.copy(folder / "experiments/mlflow.db", tmp_path / "experiments")
    monkeypatch.chdir(tmp_path)
    store.connect()
    capsys.readouterr()


@pytest.fixture
def broken(monkeypatch):
    """`broken(error)` makes all or the named calls of MLflow raise it; returns the list of calls made."""

    def break_it(error, calls=CALLS, times=None):
        made = []

        def failing(name, works=None):
            def call(self, *arguments, **named):
                made.append(name)
                if times is None or len(made) <= times:
                    raise error
                return works(self, *arguments, **named)

            return call

        for name in calls:
            monkeypatch.setattr(MlflowClient, name, failing(name, getattr(MlflowClient, name)))
        return made

    yield break_it
    monkeypatch.undo()


def compute(run):
    """Logs as a stage does: training steps, results, files and folders."""
    logger = run.logger()
    for step in range(5):
        logger.log_metrics({"train/loss": 1 / (step + 1)}, step)
    Path("selector").mkdir(exist_ok=True)
    Path("selector/config.json").write_text("the first")
    Path("summary.json").write_text("the first")
    Path("masks").mkdir(exist_ok=True)
    Path("masks/masks.json").write_text("[]")
    run.metrics({"text": 0.9, "none": float("nan")})
    run.artifact("selector", folder="selector")
    run.artifact("summary.json")
    run.artifact("masks")


def logged(run):
    """Everything that `compute` logs, as stored by MLflow."""
    client = MlflowClient(f"sqlite:///{Path.cwd()}/experiments/mlflow.db")
    history = client.get_metric_history(run.info.run_id, "train/loss")
    files = Path(run.info.artifact_uri.removeprefix("file://"))
    return {
        "steps": [(point.step, point.value) for point in history],
        "results": run.data.metrics["text"],
        "files": {str(path.relative_to(files)): path.read_text() for path in files.rglob("*.json")},
        "status": run.info.status,
    }


WHOLE = {
    "steps": [(step, 1 / (step + 1)) for step in range(5)],
    "results": 0.9,
    "files": {"selector/config.json": "the first", "summary.json": "the first", "masks.json": "[]"},
    "status": "FINISHED",
}
ERRORS = [
    MlflowException("API request\n failed"),
    OSError(28, "No space left on device"),
    RuntimeError("of a library that a store of artifacts stands on"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_failing_log_costs_no_result_and_is_sent_later(broken, monkeypatch, capsys, find, request, error):
    with tracking.run("pretrain", config.load("pretrain")) as run:
        calls = broken(error)
        compute(run)
    assert calls == ["log_batch", "log_batch"], "one call that failed, and one attempt at the end of the run"
    (home,) = unlogged.pending_folders()
    said = capsys.readouterr()
    assert re.fullmatch(
        r"atr pretrain: the metrics train/loss could not be logged \(.*\); this and everything after it "
        rf"is saved in {home}; `python -m atr.core.tracking` sends it\n",
        said.err,
    )
    for name in ("selector/config.json", "summary.json"):
        Path(name).write_text("the second, of another run")
    with pytest.raises(SystemExit, match="True"):
        command.main()
    assert unlogged.pending_folders() == [home], "it stays until it is sent"
    monkeypatch.undo()
    monkeypatch.chdir(home.parents[2])
    with pytest.raises(SystemExit, match="False"):
        command.main()
    assert unlogged.pending_folders() == [] and not home.exists()
    assert f"{home}: logged\n" in capsys.readouterr().out
    assert logged(find("pretrain")) == WHOLE
    parent = find(f"pipeline-{request.node.name}")
    assert parent.data.metrics["pretrain/text"] == 0.9
    assert parent.info.status == "FINISHED"


def test_calls_that_failed_temporarily_are_sent_at_the_end_of_the_run(broken, capsys, find):
    with tracking.run("pretrain", config.load("pretrain")) as run:
        broken(MlflowException("too busy"), times=1)
        compute(run)
    assert capsys.readouterr().err.endswith("atr pretrain: everything is logged now\n")
    assert logged(find("pretrain")) == WHOLE
    assert unlogged.pending_folders() == []


def test_metrics_and_status_are_sent_if_only_the_artifact_store_fails(broken, find):
    with tracking.run("pretrain", config.load("pretrain")) as run:
        broken(RuntimeError("no bucket"), calls=("log_artifact", "log_artifacts"))
        compute(run)
    assert logged(find("pretrain")) == WHOLE | {"files": {}}
    assert len(unlogged.pending_folders()) == 1


@pytest.mark.parametrize(("error", "status"), [(ValueError, "FAILED"), (KeyboardInterrupt, "KILLED")])
def test_the_status_of_a_run_is_saved_too(broken, monkeypatch, find, error, status):
    with pytest.raises(error), tracking.run("pretrain", config.load("pretrain")) as run:
        broken(MlflowException("gone"))
        compute(run)
        raise error
    (home,) = unlogged.pending_folders()
    assert find("pretrain").info.status == "RUNNING"
    monkeypatch.undo()
    monkeypatch.chdir(home.parents[2])
    with pytest.raises(SystemExit, match="False"):
        command.main()
    assert logged(find("pretrain")) == WHOLE | {"status": status}


def test_calls_that_cannot_be_saved_are_named_and_cost_no_result(broken, capsys):
    with tracking.run("pretrain", config.load("pretrain")) as run:
        broken(MlflowException("gone"))
        Path("experiments/unlogged").write_text("a file in its place")
        run.metrics({"text": 0.9})
    lines = capsys.readouterr().err.splitlines()
    assert "the metrics text could not be logged" in lines[0]
    assert "the metrics text is neither logged nor saved: " in lines[1]


def test_interrupting_the_log_interrupts_the_stage(broken):
    with pytest.raises(KeyboardInterrupt), tracking.run("pretrain", config.load("pretrain")) as run:
        broken(KeyboardInterrupt(), calls=("log_batch",))
        run.metrics({"text": 0.9})


def test_many_metrics_are_sent_in_the_largest_batches_of_mlflow(tmp_path):
    home = tmp_path / "unlogged" / "a"
    for step in range(1500):
        unlogged.save_call(home, {"run": "a", "metrics": [("x", 1.0, 0, step), ("y", 2.0, 0, step)]})
    unlogged.save_call(home, {"run": "b", "metrics": [("z", 3.0, 0, 0)]})
    sent = []

    class Client:
        def log_batch(self, run, metrics):
            sent.append((run, len(metrics)))

    unlogged.send_calls(Client(), home)
    assert sent == [("a", 1000)] * 3 + [("b", 1)]


def test_a_line_cut_off_by_a_full_disk_is_skipped(tmp_path, capsys):
    home = tmp_path / "unlogged" / "a"
    end = {"run": "a", "status": "FINISHED", "ended": 1}
    unlogged.save_call(home, end)
    with open(home / "calls.jsonl", "a") as calls:
        calls.write('\n{"run": "a", "met')
    unlogged.save_call(home, end | {"ended": 2})
    sent = []

    class Client:
        def set_terminated(self, *arguments):
            sent.append(arguments)

    unlogged.send_calls(Client(), home)
    assert sent == [("a", "FINISHED", 1), ("a", "FINISHED", 2)]
    assert "skipped a line cut off by a full disk" in capsys.readouterr().err


def test_a_run_unknown_to_mlflow_is_named_and_others_are_sent(capsys, broken, monkeypatch, find):
    unlogged.save_call(unlogged.run_folder("0" * 32), {"run": "0" * 32, "status": "FINISHED", "ended": 1})
    with tracking.run("pretrain", config.load("pretrain")) as run:
        broken(MlflowException("gone"))
        compute(run)
    here = Path.cwd()
    monkeypatch.undo()
    monkeypatch.chdir(here)
    with pytest.raises(SystemExit, match="True"):
        command.main()
    assert re.search(rf"experiments/unlogged/{'0' * 32}: .*not found", capsys.readouterr().err)
    assert [home.name for home in unlogged.pending_folders()] == ["0" * 32]
    assert logged(find("pretrain")) == WHOLE


def test_the_command_without_calls_succeeds_and_names_an_unusable_log(monkeypatch):
    with pytest.raises(SystemExit, match="False"):
        command.main()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////dev/null/mlflow.db")
    with pytest.raises(SystemExit, match=r"the MLflow file /dev/null/mlflow\.db cannot be written"):
        command.main()


STAGE = """
import os, signal, sys
from pathlib import Path
from atr.core import tracking
from atr.stages import entry

def main(params):
    with tracking.run("pretrain", params) as run:
        run.metrics({"before": 1.0})
        os.killpg(int(sys.argv[1]), signal.SIGKILL)
        for step in range(1000):
            run.logger().log_metrics({"train/loss": 0.5}, step)
        Path("result.json").write_text("{}")
        run.artifact("result.json")

entry("pretrain", main)
"""


@pytest.fixture
def server(tmp_path, environment):
    """`server()` starts an MLflow server, always on one port; returns its process and address."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    begun = []

    def start():
        line = (
            "server",
            "--port",
            str(port),
            "--workers",
            "1",
            "--backend-store-uri",
            f"sqlite:///{database}",
        )
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", *line, "--artifacts-destination", str(tmp_path / "stored")],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        begun.append(process)
        address = f"http://127.0.0.1:{port}"
        while True:
            assert process.poll() is None
            try:
                urlopen(f"{address}/health", timeout=5).close()
                return process, address
            except (URLError, OSError):
                time.sleep(0.5)

    database = tmp_path / "server.db"
    shutil.copy(tmp_path / "experiments/mlflow.db", database)
    yield start
    for process in begun:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
        process.wait()


@pytest.mark.slow
def test_a_server_that_dies_costs_no_result_and_is_sent_everything_later(server, tmp_path, environment):
    process, address = server()
    environment |= {"MLFLOW_TRACKING_URI": address}
    stage = [sys.executable, "-c", STAGE, str(process.pid)]
    done = subprocess.run(stage, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "result.json").read_text() == "{}"
    assert len(done.stderr.splitlines()) == 1
    send = [sys.executable, "-m", "atr.core.tracking"]
    dead = subprocess.run(send, env=environment, capture_output=True, text=True)
    assert dead.returncode == 1
    assert dead.stderr.splitlines() == [
        f"the MLflow server {address} does not answer; start it, or unset MLFLOW_TRACKING_URI to log "
        "to experiments/mlflow.db"
    ]
    (kept,) = unlogged.pending_folders()
    server()
    subprocess.run(send, env=environment, check=True)
    assert unlogged.pending_folders() == []
    client = MlflowClient(address)
    run = client.get_run(kept.name)
    assert (run.info.run_name, run.info.status) == ("pretrain", "FINISHED")
    assert run.data.metrics == {"before": 1.0, "train/loss": 0.5}
    assert len(client.get_metric_history(run.info.run_id, "train/loss")) == 1000
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["result.json"]
