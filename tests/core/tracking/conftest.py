import os
from pathlib import Path

import pytest
from mlflow import MlflowClient

from atr.core.tracking import store

ROOT = Path(__file__).parents[3]
RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID")


@pytest.fixture(scope="package")
def folder(tmp_path_factory):
    """A project with parameters; the tests share its database, which takes seconds to create."""
    folder = tmp_path_factory.mktemp("tracking")
    (folder / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        store.connect()
    return folder


@pytest.fixture(autouse=True)
def inside(folder, monkeypatch, request):
    """Runs each test as its own pipeline, in that project unless the test changes folder."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("ATR_PIPELINE", request.node.name)
    for rank in RANKS:
        monkeypatch.delenv(rank, raising=False)


@pytest.fixture
def find(request):
    """Finds the test pipeline's only run of a given name, in the project of the working directory."""

    def find(name, pipeline=request.node.name):
        client = MlflowClient(f"sqlite:///{Path.cwd()}/experiments/mlflow.db")
        experiment = client.get_experiment_by_name("atr")
        assert experiment.artifact_location == f"file://{Path.cwd()}/experiments/mlartifacts"
        where = f"tags.pipeline = '{pipeline}' and attributes.run_name = '{name}'"
        (run,) = client.search_runs([experiment.experiment_id], where)
        return run

    return find


@pytest.fixture
def environment():
    """Environment of subprocesses: our code, and a git identity."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "GIT_CONFIG_GLOBAL": os.devnull,
        "DVC_NO_ANALYTICS": "1",
    }
    environment.pop("ATR_PIPELINE")
    for who in ("AUTHOR", "COMMITTER"):
        environment |= {f"GIT_{who}_NAME": "atr", f"GIT_{who}_EMAIL": "atr@localhost"}
    return environment
