"""Cells of intrinsic, latency and robustness that have nothing to measure."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from atr.core.files import read_json

ROOT = Path(__file__).parents[2]
CELLS = [("intrinsic", "none"), ("latency", "full"), ("robustness", "random"), ("robustness", "none")]
RUN = """
import importlib, json, sys
from atr import config
for stage, reducer in json.loads(sys.argv[1]):
    importlib.import_module(f"atr.stages.{stage}").main(config.load(stage), reducer)
print(json.dumps(sorted(sys.modules)))
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("left_out")
    shutil.copy(ROOT / "params.yaml", folder)
    (folder / "data").mkdir()
    (folder / "data/micro").symlink_to(ROOT / "data/micro")
    return folder


@pytest.fixture(scope="module")
def imported(project):
    command = [sys.executable, "-c", RUN, json.dumps(CELLS)]
    done = subprocess.run(
        command, cwd=project, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True
    )
    return set(json.loads(done.stdout))


def test_nothing_heavy_is_imported_and_no_log_is_opened(project, imported):
    assert not imported & {"torch", "lightning", "transformers", "mlflow", "pandas"}
    assert not (project / "experiments/mlflow.db").exists()


@pytest.mark.usefixtures("imported")
@pytest.mark.parametrize("stage, reducer", CELLS)
def test_the_result_says_why_with_all_that_its_readers_need(project, stage, reducer):
    results = read_json(project / "experiments" / stage / reducer / "metrics.json")
    reason = "draws its tokens at random" if reducer == "random" else "takes no budget"
    assert (results["reducer"], results["left_out"], results["resolved"]) == (reducer, reason, {})
    assert results["provenance"]["versions"] and results["parameters"]


def test_a_reducer_between_layers_has_no_deployment_to_compare(tmp_path, monkeypatch):
    from atr import config
    from atr.stages import robustness

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("atr.core.tracking.run", None)
    shutil.copy(ROOT / "params.yaml", tmp_path)
    robustness.main(config.load("robustness"), "fastv")
    results = read_json(tmp_path / "experiments/robustness/fastv/metrics.json")
    assert results["left_out"] == "chooses between the layers of a language model"
    assert (results["variants"], results["questions"]) == ([], 0)
