import atexit
import gc
import os
import runpy
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest

# Before any test imports what reads them. A stray call to the hub retries for minutes.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
# As in stages: a walk over all objects of torch and transformers, after every few tests, takes its time.
gc.set_threshold(100_000, 20, 20)
atexit.register(gc.freeze)
# A shell's background jobs ignore Ctrl-C, and so would the stages that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def own_mlflow_file(monkeypatch):
    """No test logs to the server that the environment of whoever runs it names."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="session")
def hub():
    """The maker of datasets in the schemas of the paper's benchmarks."""
    return SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("hub.py"))))


@pytest.fixture(scope="session")
def repository(hub, tmp_path_factory):
    """Folder of all these datasets, to be read only."""
    folder = tmp_path_factory.mktemp("repository")
    for name in hub.DATASETS:
        hub.write(folder, name)
    return folder


_WARM = runpy.run_path(str(Path(__file__).with_name("warm.py")))


def _warm(modules):
    """Starts at the first command, and ends with the session."""
    server = _WARM["Warm"](_WARM[modules])
    yield server
    server.close()


@pytest.fixture(scope="session")
def warm_stages():
    """Runs stages in processes of their own that need not import torch, Lightning and the like."""
    yield from _warm("STAGES")


@pytest.fixture(scope="session")
def warm_dvc():
    """Runs commands of DVC in processes of their own that need not import it."""
    yield from _warm("DVC")


@pytest.fixture(scope="session")
def checkpoints():
    """The maker of folders of tiny models of the rule, with their processors."""
    return SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("checkpoints.py"))))
