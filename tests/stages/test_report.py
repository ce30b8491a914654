import json
import os
import re
import runpy
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from atr import config
from atr.datasets.prepared import save_images
from atr.reporting import style
from atr.stages import report

ROOT = Path(__file__).parents[2]
SYNTHETIC = SimpleNamespace(**runpy.run_path(str(ROOT / "tests/reporting/synthetic.py")))
QUESTIONS = 12
PREPARED = {"seed": 0, "prepare": {"source": "micro", "prompts": [], "split": "evaluate"}}


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """A project with the results of the other stages on two benchmarks; returns the logged metrics."""
    monkeypatch.chdir(tmp_path)
    shipped = (ROOT / "params.yaml").read_text()
    Path("params.yaml").write_text(shipped.replace("[selector, selector_adaptive]", "[selector]"))
    names = ("full", "none", "random", "selector", "distilled")
    SYNTHETIC.write(Path("experiments"), QUESTIONS, names, benchmarks=("docs", "shapes"))
    names = [f"{benchmark}/{index:06d}" for benchmark in ("docs", "shapes") for index in range(QUESTIONS)]
    save_images(Path("data/prepared/evaluate"), ((name, SYNTHETIC.image(name)) for name in names), PREPARED)
    Path("data/features/pretrain").mkdir(parents=True)
    Path("data/features/pretrain/components.png").write_bytes(SYNTHETIC.picture())
    logged = {}
    log = SimpleNamespace(
        metrics=lambda values, step=None: logged.setdefault(step, {}).update(values),
        artifact=lambda path: logged.setdefault("artifacts", []).append(path.name),
    )
    monkeypatch.setattr("atr.core.tracking.run", lambda stage, params: nullcontext(log))
    monkeypatch.setitem(style._RC_PARAMS, "figure.dpi", 40)  # a third of the time goes into pixels
    return logged


def run():
    report.main(config.load("report"))
    return {str(path): path.read_bytes() for path in Path("experiments/report").rglob("*") if path.is_file()}


def test_the_report_is_written_logged_and_the_same_twice(workspace):
    first = run()
    assert {name.removeprefix("experiments/report/") for name in first} == {
        "report.md",
        "report.html",
        "numbers.json",
        "text.json",
        "general.json",
        "figures/groups.png",
        *(
            f"figures/{name}.png"
            for name in ("group-text", "group-general", "benchmark-docs", "benchmark-shapes")
        ),
        *(f"figures/differences-{name}.png" for name in ("text", "general")),
        *(f"figures/{name}.png" for name in ("pages-docs", "pages-shapes", "examples", "components")),
    }
    numbers = json.loads(first["experiments/report/numbers.json"])
    assert set(numbers) == {"text", "general", "differences"}
    assert {"full", "selector@0.5", "random@0.5", "relative@0.5"} <= set(numbers["text"])
    assert workspace.pop("artifacts") == ["report.html", "numbers.json"]
    assert workspace[None]["text/selector at 0.5"] == numbers["text"]["selector@0.5"]
    difference = numbers["differences"]["0.3"]["docs"]["distilled minus random"]
    assert workspace[30]["differences/docs/distilled minus random/low"] == difference["low"]
    assert run() == first


def test_dvc_declares_the_files_that_are_written(workspace):
    declared = OmegaConf.to_container(OmegaConf.load(ROOT / "dvc.yaml"), resolve=False)["stages"]["report"]
    entries = [*declared["outs"], *declared["metrics"]]
    assert {Path(path) for entry in entries for path in entry} == {
        path for path in map(Path, {name.replace("figures/", "figures|").split("|")[0] for name in run()})
    }
    settings = [setting for entry in entries for setting in entry.values()]
    assert settings == [{"cache": False, "persist": True}] * len(entries), "a refused report keeps the former"


def test_dvc_shows_and_compares_a_dozen_numbers_in_the_width_of_a_terminal(workspace, warm_dvc):
    run()
    environment = os.environ | {"DVC_NO_ANALYTICS": "1", "GIT_CONFIG_GLOBAL": os.devnull}
    for who in ("AUTHOR", "COMMITTER"):
        environment |= {f"GIT_{who}_NAME": "atr", f"GIT_{who}_EMAIL": "atr@localhost"}

    def call(*command):
        if command[0] == "dvc":
            done = warm_dvc.run("-m", *command, env=environment)
        else:
            done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
        assert done.returncode == 0, done.stderr
        return [line.rstrip() for line in done.stdout.splitlines()]

    Path("dvc.yaml").write_text(
        f"metrics: [{', '.join(f'experiments/report/{group}.json' for group in ('text', 'general'))}]"
    )
    call("git", "init", "-q")
    call("dvc", "init", "-q")
    call("git", "add", "dvc.yaml", "experiments/report")
    call("git", "commit", "-qm", "before")
    head, *rows = call("dvc", "metrics", "show")
    groups = {"text", "general"}
    assert {row.split()[0] for row in rows} == {f"experiments/report/{group}.json" for group in groups}
    assert head.split()[1:] == [
        "distilled@.3",
        "distilled@.5",
        "full",
        "random@.5",
        "selector@.3",
        "selector@.5",
    ]
    for group in ("text", "general"):
        path = Path(f"experiments/report/{group}.json")
        path.write_text(json.dumps({key: value / 2 for key, value in json.loads(path.read_text()).items()}))
    changed = call("dvc", "metrics", "diff")
    assert len(changed) == 1 + 12
    assert max(map(len, [head, *rows, *changed])) <= 120


HOSTILE = ("../../outside", "/tmp/outside-of-the-report", "a//b", "a@b")


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("reducer", ["full", "selector", None])
def test_nothing_is_written_outside_the_report_whatever_a_benchmark_is_called(workspace, name, reducer):
    before = run()
    everything = {path for path in Path.cwd().parent.rglob("*")}
    for path in Path("experiments/evaluate").glob(f"{reducer or '*'}/*.json*"):
        path.write_text(path.read_text().replace('"docs"', json.dumps(name)))
    with pytest.raises(ValueError, match="is no name, allowed"):
        run()
    assert {path for path in Path.cwd().parent.rglob("*")} == everything
    assert {path: Path(path).read_bytes() for path in before} == before


def test_the_other_measurements_are_reported_and_logged_if_they_are_there(workspace):
    experiments = Path("experiments")
    SYNTHETIC.write_intrinsic(experiments / "intrinsic", ("selector", "random"))
    cells = SYNTHETIC.write_latency(experiments / "latency", ("selector", "random"))
    SYNTHETIC.write_robustness(experiments / "robustness", ("selector", "distilled"))
    first = run()
    assert all(f"experiments/report/figures/{name}.png" in first for name in ("overlap", "robustness"))
    for heading in (b"## Without a language model", b"## Latency", b"## Robustness to deployment"):
        assert heading in first["experiments/report/report.md"]
    assert {"intrinsic/selector/reconstruction", "intrinsic/stability"} <= set(workspace[10])
    names = [name for key, values in workspace.items() if key != "artifacts" for name in values]
    assert all(re.fullmatch(r"[\w. :/-]+", name) for name in names), "what MLflow takes as a metric's name"
    for entry in cells["random"]["entries"]:
        entry["milliseconds"] *= 1.1
    SYNTHETIC.write_json(experiments / "latency/random/metrics.json", cells["random"])
    second = run()
    numbers, page = "experiments/report/numbers.json", "experiments/report/report.md"
    assert (second[numbers] == first[numbers], second[page] == first[page]) == (True, False)


def test_a_benchmark_of_the_users_own_has_figures_named_after_its_path(workspace):
    for path in Path("experiments/evaluate").glob("*/*.json*"):
        path.write_text(path.read_text().replace('"docs"', '"my_package/my_docs"'))
    written = {name.removeprefix("experiments/report/figures/") for name in run()}
    assert {"benchmark-my_package.my_docs.png", "pages-my_package.my_docs.png"} <= written


def test_a_reducer_of_the_users_own_is_reported_under_its_path(workspace):
    Path("my_package").mkdir()
    Path("my_package/my_reducer.py").write_text('BUDGET = "asked"\n')
    evaluate = Path("experiments/evaluate")
    for path in (evaluate / "random").glob("*.json*"):
        target = evaluate / "my_package/my_reducer" / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(
            path.read_text().replace('"reducer": "random"', '"reducer": "my_package/my_reducer"')
        )
    params = config.load("report")
    reducers = [*params.evaluate.names, "my_package/my_reducer"]
    evaluated = SimpleNamespace(**{**vars(params.evaluate), "names": reducers})
    report.main(SimpleNamespace(evaluate=evaluated, report=params.report))
    numbers = json.loads(Path("experiments/report/numbers.json").read_text())
    assert numbers["text"]["my_package/my_reducer@0.5"] == numbers["text"]["random@0.5"]


def test_the_reducers_that_are_reported_are_those_that_the_parameters_name(workspace):
    first = run()
    SYNTHETIC.write(Path("experiments"), QUESTIONS, ("divprune",), benchmarks=("docs", "shapes"))
    assert run() == first
    shipped = Path("params.yaml").read_text()
    Path("params.yaml").write_text(shipped.replace("none, random]", "none, random, divprune]"))
    assert b"distilled minus divprune" in run()["experiments/report/report.md"]
    Path("params.yaml").write_text(shipped.replace("none, random]", "none, random, dart]"))
    with pytest.raises(ValueError, match=r"experiments/evaluate/dart/summary.json is missing"):
        run()


def test_a_failure_leaves_the_report_of_before(workspace):
    before = run()
    Path("experiments/evaluate/random/summary.json").unlink()
    with pytest.raises(ValueError, match=r"experiments/evaluate/random/summary.json is missing"):
        run()
    assert {name: Path(name).read_bytes() for name in before} == before
    assert [path.name for path in Path("experiments").iterdir() if path.name.startswith(".")] == []


def test_an_image_that_the_results_name_must_be_prepared(workspace):
    save_images(Path("data/prepared/evaluate"), [("docs/000000", SYNTHETIC.image("docs/000000"))], PREPARED)
    with pytest.raises(ValueError, match="data/prepared/evaluate has no image docs/000001"):
        run()
    assert not Path("experiments/report").exists()


def test_the_report_loads_no_model_library():
    code = """
import sys
from atr.stages import report
from atr.datasets import PreparedImages
from atr.reporting import html, intrinsic, latency, markdown, report, result_files, robustness
print({"torch", "transformers", "lightning", "matplotlib.pyplot"} & set(sys.modules))
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=240)
    assert done.stdout.strip() == "set()"
