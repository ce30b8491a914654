import json
import runpy
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from atr.reporting.intrinsic import load_intrinsic
from atr.reporting.latency import load_latency
from atr.reporting.report import Measurements, build_report
from atr.reporting.result_files import load_results
from atr.reporting.robustness import load_robustness

PAPER = ("full", "none", "random", "selector")
PEERS = (
    "average_pooling", "cdpruner", "cdpruner_text", "class_attention", "dart", "divprune", "fastv", "hired",
    "holov", "image_downsampling", "l2_norm", "mmr", "pixel_variance", "prumerge", "prumerge_plus",
    "pyramiddrop", "scope", "tome",
)  # fmt: skip


@pytest.fixture(scope="session")
def synthetic():
    """The maker of made-up results."""
    return SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("synthetic.py"))))


@pytest.fixture(scope="session")
def folder(synthetic, tmp_path_factory):
    """Folder of results, to be read only."""
    return synthetic.write(tmp_path_factory.mktemp("results"))


@pytest.fixture
def world(folder, tmp_path):
    """Folder of results, to be spoilt."""
    return shutil.copytree(folder, tmp_path / "experiments")


@pytest.fixture(scope="session")
def load():
    def loaded(folder, names=PAPER):
        return load_results(folder / "evaluate", folder / "pretrain/metrics.json", names)

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
def measured(load, folder):
    return load(folder)


@pytest.fixture(scope="session")
def built(measured, synthetic):
    return build_report(measured, synthetic.image, synthetic.SETTINGS, synthetic.picture())


@pytest.fixture(scope="session")
def peers():
    """The eighteen peers of `crowd`."""
    return PEERS


@pytest.fixture(scope="session")
def crowd(synthetic, load, tmp_path_factory):
    """Results of twenty reducers that take a kept fraction, and of two that choose their own count."""
    names = ("full", "none", "random", "selector", *PEERS, "selector_adaptive", "prumerge_adaptive")
    return load(synthetic.write(tmp_path_factory.mktemp("crowd"), 10, names), names)


@pytest.fixture(scope="session")
def everything(crowd, synthetic, tmp_path_factory):
    """The report with all sections."""
    folder = tmp_path_factory.mktemp("measured")
    names = ("selector", "random", "average_pooling")
    synthetic.write_intrinsic(folder / "intrinsic", names)
    synthetic.write_latency(folder / "latency", names)
    synthetic.write_robustness(folder / "robustness", ("selector", "average_pooling"))
    measured = Measurements(
        load_intrinsic(folder / "intrinsic", names),
        load_latency(folder / "latency", names),
        load_robustness(folder / "robustness", ("full", *names)),
    )
    settings = synthetic.SETTINGS | {"best": "average_pooling"}
    return build_report(crowd, synthetic.image, settings, synthetic.picture(), measured)
