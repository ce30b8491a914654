"""The whole pipeline in one process, stage by stage, as DVC runs it."""

import shutil
from pathlib import Path

import pytest

from atr import config
from atr.cli import overlay
from atr.stages import (
    SPLITS,
    distill,
    evaluate,
    extract,
    intrinsic,
    latency,
    prefill,
    prepare,
    pretrain,
    reconstructor,
    report,
    robustness,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def run_overlay():
    """Runs every stage under an overlay with some more settings, in a folder that holds data and models."""

    def run_overlay(folder, name, settings):
        shutil.copy(ROOT / "params.yaml", folder)
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            patch.setenv("MLFLOW_TRACKING_URI", "")  # and taken back, as Lightning's logger sets it
            overlay.apply(ROOT / "experiments" / f"{name}.yaml", settings)
            prepare.main(config.load("prepare"))
            for split in SPLITS:
                extract.main(config.load("extract"), split)
            for stage in (pretrain, distill, reconstructor, prefill):
                stage.main(config.load(stage.__name__.rpartition(".")[2]))
            for reducer in config.load("report").evaluate.names:
                for stage in (evaluate, intrinsic, latency, robustness):
                    stage.main(config.load(stage.__name__.rpartition(".")[2]), reducer)
            report.main(config.load("report"))

    return run_overlay
