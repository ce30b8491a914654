"""Every stage in turn, by its own main and with the real log, on a handful of images of the micro world."""

import os
import re
from pathlib import Path

import pytest

from atr import config
from atr.core.answer_files import load_rows
from atr.core.files import read_json
from atr.stages import (
    benchmark,
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
CHANGES = {
    "accelerator": "cpu",
    "images": 48,
    "questions": 4,
    "shard_images": 32,
    "epochs": 2,
    "batch_size": 8,
    "mask_images": 2,
    "collapse_after": 1.0,
    "random_seeds": 3,
    "seconds": 0.001,
    "bootstrap": 20,
}
REDUCERS = ("full", "none", "random", "selector", "distilled")
BENCHMARKS = ("docs", "signs", "charts", "shapes", "digits", "scenes")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A project in which the whole pipeline has run on the shipped model."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "data").mkdir()
    (folder / "data/micro").symlink_to(ROOT / "data/micro")
    (folder / "params.yaml").write_text(parameters())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MLFLOW_TRACKING_URI", "")  # and taken back, as Lightning's logger sets it
        patch.setenv("ATR_PIPELINE", "sequence")
        for name in BENCHMARKS:
            benchmark.main(config.load("benchmark"), name)
        prepare.main(config.load("prepare"))
        for split in extract.SPLITS:
            extract.main(config.load("extract"), split)
        pretrain.main(config.load("pretrain"))
        distill.main(config.load("distill"))
        reconstructor.main(config.load("reconstructor"))
        prefill.main(config.load("prefill"))
        for reducer in REDUCERS:
            for stage in (evaluate, intrinsic, latency, robustness):
                stage.main(config.load(stage.__name__.rpartition(".")[2]), reducer)
        report.main(config.load("report"))
    return folder


def parameters():
    """The shipped ones, of a size for a test."""
    text = (ROOT / "params.yaml").read_text()
    for key, value in CHANGES.items():
        text, count = re.subn(rf"^( +{key}: ).*$", rf"\g<1>{value}", text, flags=re.MULTILINE)
        assert count, key
    text = re.sub(r"^  keep: \[.*\]$", "  keep: [0.2, 0.4, 0.5]", text, flags=re.MULTILINE)
    text = text.replace("[selector, selector_adaptive]", "[selector]")
    pretrained, distilled = text.split("\ndistill:")  # which learns from fewer than there are
    return pretrained + "\ndistill:" + distilled.replace("  images: 48", "  images: 40", 1)


def contents(folder):
    """All files that stages leave, by name; the log, and what a stage goes on from, are no output."""
    tops = ("data/prepared", "data/features", "experiments")
    files = [path for top in tops for path in (folder / top).rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if is_output(path)}


def is_output(path):
    return not is_log(path) and not {"unfinished", "checkpoints"} & {*path.parts}


def is_log(path):
    return path.name.startswith("mlflow") or "mlruns" in path.parts or "mlartifacts" in path.parts


def test_each_benchmark_is_answered_by_each_reducer(project):
    for reducer in REDUCERS:
        summary = read_json(project / "experiments/evaluate" / reducer / "summary.json")
        assert {score.get("benchmark") for score in summary["scores"]} >= set(BENCHMARKS)
        assert summary["parameters"]["seed"] == 0 and summary["provenance"]["versions"]
        rows = load_rows(project / "experiments/evaluate" / reducer / "results.jsonl")
        assert {row.tokens for row in rows} == {"full": {144}, "none": {0}}.get(reducer, {29, 58, 72})


def cells(project, stage):
    """What a stage found of each reducer."""
    return {name: read_json(project / f"experiments/{stage}/{name}/metrics.json") for name in REDUCERS}


def test_the_reducers_are_measured_and_timed(project):
    measured, timed = cells(project, "intrinsic"), cells(project, "latency")
    assert {name for name in REDUCERS if measured[name]["lines"]} == {"random", "selector"}
    assert "projected_BND" in measured["distilled"]["left_out"], "it asks what the projector makes"
    assert {name for name in REDUCERS if timed[name]["entries"]} == {"random", "selector", "distilled"}
    coverage = measured["random"]["lines"]["text_coverage"]
    assert coverage == pytest.approx([0.2, 0.4, 0.5], abs=0.1), "random tokens cover what they are of all"
    assert {entry["tokens"] for cell in timed.values() for entry in cell["entries"]} == {144}


def test_every_deployment_is_compared_and_the_report_shows_it(project):
    compared = cells(project, "robustness")
    assert {name for name in REDUCERS if compared[name]["variants"]} == {"full", "selector", "distilled"}
    assert compared["random"]["left_out"] and compared["none"]["left_out"]
    own = compared["selector"]
    assert own["questions"] == 4 * len(BENCHMARKS) and own["photographs"] == 12
    assert own["full"] is None and compared["full"]["full"] > 0
    changed = {variant["name"]: variant for variant in own["variants"]}
    assert all(overlap["lowest"] == 1 for overlap in changed["batch of one"]["reducers"]["selector"]["iou"])
    resized = changed["resize by torch bicubic no antialias"]
    assert resized["no_pixel_changed"] and not changed["JPEG 75"]["no_pixel_changed"]
    assert resized["reducers"]["selector"]["iou"][1] == {"mean": 1.0, "lowest": 1.0}
    assert resized["reducers"]["selector"]["photographs"][1]["mean"] < 1
    assert changed["JPEG 75"]["reducers"]["selector"]["iou"][1]["mean"] < 1
    page = (project / "experiments/report/report.md").read_text()
    assert all(f"| {name} |" in page for name in changed)


def test_the_distilled_selector_says_who_taught_it(project):
    card = (project / "experiments/distill/selector/README.md").read_text()
    assert "| distilled from the answers of | micro |" in card
    assert "| positions of the kept tokens | original |" in card
    assert "| training images | 40 |" in card
    results = read_json(project / "experiments/distill/metrics.json")
    assert len(results["history"]) == 2 and results["provenance"]["versions"]


def test_the_report_shows_every_benchmark(project):
    page = (project / "experiments/report/report.html").read_text()
    assert all(benchmark in page for benchmark in BENCHMARKS)
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_all_stages_are_logged_under_one_parent(project):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{project / 'experiments/mlflow.db'}")
    (experiment,) = [found for found in client.search_experiments() if found.name == "atr"]
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    measured = 3 + 3 + 2  # by robustness, latency and intrinsic: the others have nothing to measure
    assert len(children) == len(runs) - 1 == 1 + 2 + 2 + 2 + len(REDUCERS) + measured + 1
    assert {run.data.tags["stage"] for run in children} == {
        "prepare", "extract", "pretrain", "distill", "evaluate", "reconstructor", "intrinsic", "prefill",
        "latency", "robustness", "report",
    }  # fmt: skip
    assert {run.info.status for run in children} == {"FINISHED"}


INTERRUPTED = """
import os, runpy, sys, time
from importlib import import_module
stage, owner, name, number, *arguments = sys.argv[1:]
def interrupt(*_, **__):
    os.kill(os.getpid(), int(number))
    time.sleep(60)
setattr(import_module(owner), name, interrupt)
sys.argv = [stage, *arguments]
runpy.run_module(f"atr.stages.{stage}", run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage, owner, name, arguments",
    [
        ("prepare", "atr.datasets.questions", "save_questions", ()),
        ("evaluate", "atr.core.answer_files", "save_rows", ("full",)),
        ("report", "atr.reporting.html", "render_html", ()),
    ],
)
@pytest.mark.parametrize("number, code", [(2, 130), (15, 143)])
def test_a_signal_keeps_what_was_finished(project, warm_stages, stage, owner, name, arguments, number, code):
    before = contents(project)
    done = warm_stages.run(
        "-c", INTERRUPTED, stage, owner, name, number, *arguments,
        cwd=project, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == code, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    assert contents(project) == before
    assert not list(project.rglob("*.part"))
