import json
import runpy
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from atr.reporting import intrinsic, report, results, robustness


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
    def loaded(folder, names=results.PAPER):
        return results.load(folder / "evaluate", folder / "pretrain/metrics.json", names)

    return loaded


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


@pytest.fixture(scope="session")
def crowd(synthetic, load, tmp_path_factory):
    """Results of twenty reducers that take a budget, and of two that decide it."""
    peers = [f"peer-{number:02d}" for number in range(18)]
    names = ("full", "none", "random", "selector", *peers, "selector_adaptive", "peer-03-adaptive")
    return load(synthetic.write(tmp_path_factory.mktemp("crowd"), 10, names), names)


@pytest.fixture(scope="session")
def everything(crowd, synthetic, tmp_path_factory):
    """The report of all there can be."""
    folder = tmp_path_factory.mktemp("measured")
    names = ("selector", "random", "peer-00")
    synthetic.write_measure(folder / "metrics.json", names)
    synthetic.write_cost(folder / "cost.json", names)
    synthetic.write_robustness(folder / "robustness.json", names)
    measure = intrinsic.load_intrinsic(folder / "metrics.json")
    cost = intrinsic.load_latency(folder / "cost.json")
    robust = robustness.load_robustness(folder / "robustness.json")
    settings = synthetic.SETTINGS | {"best": "peer-00"}
    return report.build(crowd, synthetic.image, settings, synthetic.picture(), measure, cost, robust)
