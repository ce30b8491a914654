import os
import re
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from mlflow import MlflowClient

from atr import config
from atr.core import tracking
from atr.core.tracking import store

ROOT = Path(__file__).parents[3]


def log(stage="report"):
    """One execution of a stage, with a metric and an artifact."""
    with tracking.run(stage, config.load(stage)) as run:
        run.metrics({"kept": 0.3})
        run.artifact("params.yaml")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["folder in its place", "file above it", "no database"])
def test_a_log_that_cannot_be_written_is_refused_at_the_start(tmp_path, monkeypatch, kind):
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    monkeypatch.chdir(tmp_path)
    database = tmp_path / "experiments" / "mlflow.db"
    if kind == "folder in its place":
        database.mkdir(parents=True)
    elif kind == "file above it":
        database.parent.write_text("")
    else:
        database.parent.mkdir()
        database.write_bytes(b"not a database" * 1000)
    with pytest.raises(ValueError, match=f"MLflow file {database} cannot be written"):
        tracking.run("prepare", config.load("prepare")).__enter__()


@pytest.fixture
def read_only():
    """A database that is read-only for the current user; root drops its privileges meanwhile."""
    with TemporaryDirectory() as folder:
        database = Path(folder) / "mlflow.db"
        with closing(sqlite3.connect(database)) as connection:
            connection.execute("CREATE TABLE runs (a)")
        database.chmod(0o444)
        database.parent.chmod(0o755)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        yield database
        os.seteuid(user)


def test_a_read_only_log_is_named(read_only):
    with pytest.raises(ValueError, match=f"{read_only} cannot be written: .*readonly"):
        store._check_writable(read_only)


def test_the_write_check_leaves_the_database_unchanged(tmp_path):
    store._check_writable(tmp_path / "mlflow.db")
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as connection:
        assert connection.execute("SELECT name FROM sqlite_master").fetchall() == []


def test_the_uri_of_the_environment_wins(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/no/folder/../mlflow.db")
    (tmp_path / "no").write_text("a file")
    with pytest.raises(ValueError, match=r"no/folder/\.\./mlflow\.db cannot be written"):
        tracking.run("prepare", config.load("prepare")).__enter__()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path}/mlruns")
    with pytest.raises(ValueError, match=f"MLflow log file:{tmp_path}/mlruns cannot be used"):
        tracking.run("prepare", config.load("prepare")).__enter__()


@pytest.mark.parametrize("copy", [".dvc/tmp/exps/tmpa1b2", ".dvc/tmp/exps/standalone/tmpa1b2", ""])
@pytest.mark.parametrize("below", ["", "inner"])
def test_the_project_of_a_copy_made_by_dvc_is_the_original(tmp_path, monkeypatch, copy, below):
    """`below`: the project's folder within a larger repository, of which DVC copies the whole."""
    here = tmp_path / copy / below if copy else tmp_path
    here.mkdir(parents=True, exist_ok=True)
    monkeypatch.chdir(here)
    assert store.project_folder() == tmp_path
    assert store.tracking_uri() == f"sqlite:///{tmp_path}/experiments/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///logs/all.db")
    assert store.tracking_uri() == f"sqlite:///{tmp_path}/logs/all.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////logs/all.db")
    assert store.tracking_uri() == "sqlite:////logs/all.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://somebody:secret@localhost/mlflow")
    assert store.tracking_uri() == "https://somebody:secret@localhost/mlflow"
    assert store.uri_without_password() == "https://localhost/mlflow"


STAGE = """
from atr import config
from atr.core import tracking
from atr.stages import entry

def main(params):
    with tracking.run("report", params) as run:
        open("result.json", "w").write("{}")
        run.artifact("result.json")
        if params.report.examples == 1:
            raise ValueError("this one fails")

entry("report", main)
"""


@pytest.fixture
def repository(tmp_path, monkeypatch, environment):
    """A DVC project whose only stage logs, and a function that runs commands in it."""
    shutil.copy(ROOT / "params.yaml", tmp_path)
    (tmp_path / "stage.py").write_text(STAGE)
    (tmp_path / "dvc.yaml").write_text(
        f"stages:\n  report:\n    cmd: {sys.executable} stage.py\n    deps: [stage.py]\n"
        "    params: [evaluate, report]\n    outs: [{result.json: {cache: false}}]\n"
    )
    shutil.copy(ROOT / ".gitignore", tmp_path)

    def call(*command, code=0):
        # To a file: the workers of a queue hold a pipe open for as long as they live.
        with open(tmp_path.with_name(f"{tmp_path.name}.said"), "w+") as file:
            done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
            file.seek(0)
            said = file.read()
        assert done.returncode == code, said
        return said

    monkeypatch.chdir(tmp_path)
    call("git", "init", "-q")
    call(*DVC, "init", "-q")
    call("git", "add", "--all")
    call("git", "commit", "-qm", "before")
    return call


DVC = (sys.executable, "-m", "dvc")


def runs():
    """Name, status and artifacts of the runs in the working directory's database."""
    client = MlflowClient(f"sqlite:///{Path.cwd()}/experiments/mlflow.db")
    (experiment,) = (one for one in client.search_experiments() if one.name == "atr")
    found = client.search_runs([experiment.experiment_id])
    return sorted(
        (
            re.sub("pipeline-.*", "pipeline", run.info.run_name),
            run.info.status,
            *(file.path for file in client.list_artifacts(run.info.run_id)),
        )
        for run in found
    )


@pytest.mark.slow
def test_an_experiment_in_a_copy_logs_into_the_users_own_database(repository):
    repository(*DVC, "exp", "run", "--temp", "-S", "report.examples=5")
    assert runs() == [("pipeline", "FINISHED"), ("report", "FINISHED", "result.json")]
    repository(*DVC, "exp", "run", "--temp", "-S", "report.examples=1", code=255)
    assert runs()[:2] == [("pipeline", "FAILED"), ("pipeline", "FINISHED")]
    assert runs()[2:] == [
        ("report", "FAILED", "result.json"),
        ("report", "FINISHED", "result.json"),
    ]
    assert len(list(Path("experiments/mlartifacts").glob("*/artifacts/result.json"))) == 2


@pytest.mark.slow
def test_two_queue_workers_create_one_database(repository):
    for examples in (2, 4):
        repository(*DVC, "exp", "run", "--queue", "-S", f"report.examples={examples}")
    repository(*DVC, "queue", "start", "-j", "2")
    try:
        while "Queued" in (status := repository(*DVC, "queue", "status")) or "Running" in status:
            time.sleep(1)
        assert status.count("Success") == 2, repository(*DVC, "queue", "logs", status.split()[5])
    finally:
        repository(*DVC, "queue", "stop", "--kill")
    finished = ("report", "FINISHED", "result.json")
    assert runs() == [("pipeline", "FINISHED")] * 2 + [finished] * 2


@pytest.mark.slow
def test_concurrent_processes_create_one_complete_database(tmp_path, monkeypatch, environment):
    shutil.copy(ROOT / "params.yaml", tmp_path)
    (tmp_path / "stage.py").write_text(STAGE)
    monkeypatch.chdir(tmp_path)
    begun = [
        subprocess.Popen([sys.executable, "stage.py"], env=environment, stderr=subprocess.PIPE)
        for _ in range(3)
    ]
    said = [process.communicate()[1].decode() for process in begun]
    assert ([process.returncode for process in begun], said) == ([0] * 3, [""] * 3)
    assert [run[0] for run in runs()] == ["pipeline"] * 3 + ["report"] * 3


@pytest.fixture
def original(tmp_path, folder, monkeypatch):
    """A separate project as working directory, with one run in its log."""
    original = tmp_path / "original"
    (original / "experiments").mkdir(parents=True)
    shutil.copy(folder / "params.yaml", original)
    shutil.copy(folder / "experiments/mlflow.db", original / "experiments")
    monkeypatch.chdir(original)
    log()
    return original


def content(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_copied_project_logs_beside_itself(original, tmp_path, monkeypatch, find, capsys):
    copy = tmp_path / "copy of it"
    shutil.copytree(original, copy)
    before = content(original)
    monkeypatch.chdir(copy)
    capsys.readouterr()
    with tracking.run("prepare", config.load("prepare")) as run:
        run.artifact("params.yaml", folder="new")
    assert f"copied or moved: its artifacts are now in {copy.as_uri()}" in capsys.readouterr().err
    assert content(original) == before
    client = MlflowClient(f"sqlite:///{copy}/experiments/mlflow.db")
    (experiment,) = client.search_experiments(filter_string="name = 'atr'")
    assert experiment.artifact_location == f"{copy.as_uri()}/experiments/mlartifacts"
    for run in client.search_runs([experiment.experiment_id]):
        assert run.info.artifact_uri.startswith(experiment.artifact_location)
        if not run.info.run_name.startswith("pipeline"):
            assert len(client.list_artifacts(run.info.run_id)) == 1
    store.connect()
    assert capsys.readouterr().err == "", "the message is printed once"


def test_an_artifact_location_chosen_by_the_user_stays(original, tmp_path, monkeypatch, capsys):
    with closing(sqlite3.connect("experiments/mlflow.db")) as connection, connection:
        connection.execute("UPDATE experiments SET artifact_location = 's3://bucket/mine' WHERE name = 'atr'")
    capsys.readouterr()
    client, experiment = store.connect()
    assert client.get_experiment(experiment).artifact_location == "s3://bucket/mine"
    assert capsys.readouterr().err == ""


def test_an_experiment_that_was_deleted_is_restored(original, find, capsys):
    client, experiment = store.connect()
    client.delete_experiment(experiment)
    capsys.readouterr()
    log("prepare")
    assert capsys.readouterr().err == (
        "atr: the MLflow experiment atr had been deleted; it is restored, with its runs\n"
    )
    assert find("prepare").info.status == find("report").info.status == "FINISHED"


def test_another_pipeline_may_create_the_experiment_first(original, monkeypatch):
    """As on a server, which our lock does not protect."""
    get, calls = MlflowClient.get_experiment_by_name, []

    def late(self, name):
        calls.append(name)
        return get(self, name) if len(calls) > 1 else None

    monkeypatch.setattr(MlflowClient, "get_experiment_by_name", late)
    assert store.connect()[1] == get(MlflowClient(store.tracking_uri()), "atr").experiment_id


@pytest.fixture
def port():
    """A port that accepts connections and never answers, or refuses them when closed."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server


@pytest.mark.timeout(60)
@pytest.mark.parametrize("closed", [True, False])
def test_a_dead_server_is_refused_at_the_start(port, monkeypatch, closed):
    monkeypatch.setattr(store, "_PROBE_SECONDS", 1)
    address = f"127.0.0.1:{port.getsockname()[1]}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://somebody:secret@{address}")
    if closed:
        port.close()
    with pytest.raises(ValueError, match=rf"^the MLflow server http://{address} does not answer; [^\n]*$"):
        tracking.run("prepare", config.load("prepare")).__enter__()


def test_the_timeouts_of_a_server_are_short(monkeypatch):
    from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_MAX_RETRIES as RETRIES
    from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_TIMEOUT as TIMEOUT

    for variable in (RETRIES, TIMEOUT):
        monkeypatch.delenv(variable.name, raising=False)
    store.connect()
    assert (1 + RETRIES.get()) * TIMEOUT.get() <= 60
    monkeypatch.setenv(TIMEOUT.name, "7")
    store.connect()
    assert TIMEOUT.get() == 7, "the user's own wins"


def test_an_error_of_mlflow_at_the_start_becomes_one_line(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("one\n  two")

    monkeypatch.setattr(MlflowClient, "search_runs", fail)
    with pytest.raises(ValueError, match=r"^the MLflow log sqlite:.*mlflow\.db cannot be used: one two$"):
        tracking.run("prepare", config.load("prepare")).__enter__()
    assert len(store.one_line(RuntimeError("long " * 1000))) < 310
    assert store.one_line(TimeoutError()) == "TimeoutError"
