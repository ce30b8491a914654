import os
from pathlib import Path

import pytest
from mlflow import MlflowClient

from atr.core.tracking import store

ROOT = Path(__file__).parents[3]
RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID")


@pytest.fixture(scope="package")
def folder(tmp_path_factory):
    """A project with parameters; its database, which takes seconds to make, is shared by the tests."""
    folder = tmp_path_factory.mktemp("tracking")
    (folder / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        store.connect()
    return folder


@pytest.fixture(autouse=True)
def inside(folder, monkeypatch, request):
    """Each test is a pipeline of its own in that project, or in one that it changes to."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("ATR_PIPELINE", request.node.name)
    for rank in RANKS:
        monkeypatch.delenv(rank, raising=False)


@pytest.fixture
def find(request):
    """Looks up the one run of the test's pipeline by its name, in the project that is the working folder."""

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
    """For processes of their own: our code, and a name to commit under."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "GIT_CONFIG_GLOBAL": os.devnull,
        "DVC_NO_ANALYTICS": "1",
    }
    environment.pop("ATR_PIPELINE")
    for who in ("AUTHOR", "COMMITTER"):
        environment |= {f"GIT_{who}_NAME": "atr", f"GIT_{who}_EMAIL": "atr@localhost"}
    return environment
