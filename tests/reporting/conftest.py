import json
import runpy
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from atr.reporting import report, results


@pytest.fixture(scope="session")
def synthetic():
    """The maker of made-up results."""
    return SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("synthetic.py"))))


@pytest.fixture(scope="session")
def made(synthetic, tmp_path_factory):
    """Folder of results, to be read only."""
    return synthetic.write(tmp_path_factory.mktemp("made"))


@pytest.fixture
def world(made, tmp_path):
    """Folder of results, to be spoilt."""
    return shutil.copytree(made, tmp_path / "experiments")


@pytest.fixture(scope="session")
def load():
    return lambda folder: results.load(folder / "evaluate", folder / "pretrain/metrics.json")


@pytest.fixture
def change():
    """Applies a function to the content of a JSON file."""

    def changed(path, function):
        content = json.loads(path.read_text())
        function(content)
        path.write_text(json.dumps(content))

    return changed


@pytest.fixture(scope="session")
def measured(load, made):
    return load(made)


@pytest.fixture(scope="session")
def built(measured, synthetic):
    return report.build(measured, synthetic.image, synthetic.SETTINGS, synthetic.picture())
