"""The code of docs/extending.md, written into a project as it stands on the page, and run."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import yaml

from atr.core.answer_files import load_rows, save_rows
from atr.core.records import Row

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/extending.md").read_text()
BLOCKS = re.findall(r"^```\w+\n# ([^\n,]+)(?:, ([^\n]+))?\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
"""File, place in it, and code of each block."""


def write(folder, *paths):
    """Write the blocks of these files into a folder, into the place of the file that a block names."""
    for path, place, code in BLOCKS:
        if path in paths:
            file = folder / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(inserted(file.read_text(), place, code) if place else code)


def inserted(text, place, code):
    if place == "at the end":
        return text + code
    side, line = re.fullmatch(r'(before|after) "(.*)"', place).groups()
    assert text.count(f"{line}\n") == 1, line
    return text.replace(f"{line}\n", f"{code}{line}\n" if side == "before" else f"{line}\n{code}")


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with the parameters of this repository and the micro model."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "micro").symlink_to(ROOT / "data" / "micro")
    shutil.copy(ROOT / "params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_package"]:
        del sys.modules[name]


@pytest.fixture
def package(project):
    """The project with a copy of the package that the blocks may edit."""
    shutil.copytree(ROOT / "atr", project / "atr", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "dvc.yaml", project)
    return project


def python(folder, *arguments):
    """Run python with the folder's own copy of the package."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "MLFLOW_TRACKING_URI": ""}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def change(**values):
    """Set values of params.yaml, `section__key=value`."""
    params = yaml.safe_load(Path("params.yaml").read_text())
    for key, value in values.items():
        section, name = key.split("__")
        params[section][name] = value
    Path("params.yaml").write_text(yaml.safe_dump(params))


def micro():
    """The micro model and its inputs for one page."""
    from atr.micro import world
    from atr.vlm.checkpoint import load_vlm

    model, processor = load_vlm(str(ROOT / "data/micro/llava"), torch.float32)
    image = world.sample("docs", "evaluate", 0, 0).image
    return model, processor(images=image, text="<image> total", return_tensors="pt")


def test_every_block_is_run_here():
    assert {path for path, _, _ in BLOCKS} == {
        "my_package/far_from_mean.py", "my_package/receipts.py", "my_package/my_llava.py",
        "my_package/my_vlm.py",
        "pyproject.toml",
        "atr/config/presets/encoders/siglip-base-patch16-224.yaml", "atr/stages/mistakes.py",
        "atr/config/mistakes.py", "atr/config/stages.py", "params.yaml", "dvc.yaml",
    }  # fmt: skip


def test_a_reducer_passes_the_check_and_serves_reduce_and_the_parameters(project, capsys):
    from atr import config, reduce
    from atr.cli.main import main
    from atr.reduction.registry import build_reducer

    write(project, "my_package/far_from_mean.py")
    try:
        main(["check", "my_package.far_from_mean:FarFromMean"])
    except SystemExit as stop:
        assert not stop.code, capsys.readouterr()
    assert "independent of the batch" in capsys.readouterr().out
    change(evaluate__own=["my_package/far_from_mean"])
    config.load("evaluate")
    model, inputs = micro()
    reducer = build_reducer("my_package/far_from_mean")
    assert reduce(model, inputs, reducer, keep=0.4).kept[0].tokens == 58


@pytest.mark.slow
def test_a_reducer_is_evaluated(project, monkeypatch):
    from atr import config
    from atr.stages import evaluate, extract, prepare

    write(project, "my_package/far_from_mean.py")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    change(
        evaluate__own=["my_package/far_from_mean"], evaluate__keep=[0.4], evaluate__bootstrap=20,
        prepare__benchmarks=["docs"], prepare__images=4, prepare__questions=4, trainer__accelerator="cpu",
        trainer__precision="32-true",
    )  # fmt: skip
    prepare.main(config.load("prepare"))
    extract.main(config.load("extract"), "evaluate")
    evaluate.main(config.load("evaluate"), "my_package/far_from_mean")
    rows = load_rows(project / "experiments/evaluate/my_package/far_from_mean/results.jsonl")
    assert [row.tokens for row in rows] == [58] * 4


def test_a_benchmark_is_prepared_and_scored(project, hub, monkeypatch):
    import pyarrow as pa
    import pyarrow.parquet as pq

    from atr import config
    from atr.benchmarks import load_benchmark
    from atr.datasets.questions import load_questions
    from atr.stages import EVALUATE_IMAGES, prepare

    write(project, "my_package/receipts.py")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    rows = [{"id": f"r{n}", "question": "total?", "answer": "12.50", "image": hub.image(n)} for n in range(3)]
    types = dict.fromkeys(("id", "question", "answer"), hub.STRING) | {"image": hub.IMAGE}
    file = project / "datasets/my-org/receipts/data/test-00000-of-00001.parquet"
    file.parent.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows, pa.schema(types.items())), file)
    change(
        prepare__own=["my_package/receipts"], prepare__benchmarks=["docs"], prepare__repository="datasets",
        prepare__images=2, prepare__questions=2,
    )  # fmt: skip
    prepare.main(config.load("prepare"))
    questions = [q for q in load_questions(EVALUATE_IMAGES) if q.benchmark == "my_package/receipts"]
    assert len(questions) == 2 and {question.group for question in questions} == {"text"}
    score = load_benchmark("my_package/receipts").score
    assert score("12.50", questions[0]) == 1 and score("no idea at all", questions[0]) == 0


@pytest.fixture
def installed(project):
    """The project with its families, and what `pip install` leaves of their entry points."""
    write(project, "my_package/my_llava.py", "my_package/my_vlm.py", "pyproject.toml")
    declared = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    folder = project / "my_package-0.1.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Name: {declared['name']}\nVersion: {declared['version']}\n")
    ((group, points),) = declared["entry-points"].items()
    lines = [f"[{group}]", *(f"{name} = {target}" for name, target in points.items())]
    (folder / "entry_points.txt").write_text("\n".join(lines))


def test_a_family_is_found_by_its_entry_point(installed):
    from atr import reduce
    from atr.reduction.registry import build_reducer

    model, inputs = micro()
    reducer = build_reducer("l2_norm")
    expected = reduce(model, inputs, reducer, keep=0.4).kept[0].indices_K
    model.config.model_type = "my_llava"
    assert torch.equal(reduce(model, inputs, reducer, keep=0.4).kept[0].indices_K, expected)


@torch.no_grad()
def test_an_entry_says_where_a_type_leaves_the_rule(installed):
    from atr import reduce
    from atr.reduction.registry import build_reducer
    from atr.vlm.families.tiny import tiny_config, tiny_model
    from atr.vlm.families.tiny_inputs import tiny_inputs
    from atr.vlm.families.videos import video_keys

    model, reducer = tiny_model(tiny_config("exaone4_5")), build_reducer("divprune")
    inputs = tiny_inputs(model)
    model.config.model_type = "my_vlm"
    with pytest.raises(ValueError, match="positions: original is not supported by my_vlm, whose generate"):
        reduce(model, inputs, reducer, keep=0.5)
    reduced = reduce(model, inputs, reducer, keep=0.5, positions="contiguous")
    assert [kept.tokens for kept in reduced.kept] == [3, 3, 2]
    assert model(**reduced).logits.isfinite().all()
    assert "pixel_values_videos" in video_keys(model)


def test_an_encoder_is_a_preset(package):
    write(package, "atr/config/presets/encoders/siglip-base-patch16-224.yaml")
    params = yaml.safe_load(Path("params.yaml").read_text())
    params |= {"encoder": "siglip-base-patch16-224", "vlm": "./data/micro/llava"}
    params["pretrain"]["heads"] = params["distill"]["heads"] = 12
    Path("params.yaml").write_text(yaml.safe_dump(params))
    shown = python(package, "-c", "from atr import config; print(config.load('extract').encoder)")
    assert "path='google/siglip-base-patch16-224', layer=-2" in shown.stdout, shown.stderr


def test_the_table_of_reruns_is_what_the_command_prints(capsys, monkeypatch):
    from atr.cli.main import main

    block = re.search(r"<!-- reruns -->\n```\n(.*?)```\n<!-- /reruns -->", PAGE, flags=re.DOTALL)[1]
    files = [file for line in block.splitlines() for file in line.partition(":")[0].split(", ")]
    monkeypatch.chdir(ROOT)
    main(["reruns", *files])
    assert capsys.readouterr().out == block


def test_a_stage_runs(package):
    write(package, "atr/stages/mistakes.py", "atr/config/mistakes.py", "atr/config/stages.py")
    write(package, "params.yaml", "dvc.yaml")
    for reducer, keep, scores in (("full", 1.0, [1, 1, 0]), ("distilled", 0.3, [1, 0, 0])):
        rows = [
            Row(f"q{n}", "docs", "text", "which", ["7"], keep, None, 1, 1, 2, "7", score, score)
            for n, score in enumerate(scores)
        ]
        save_rows(package / "experiments" / "evaluate" / reducer / "results.jsonl", rows)
    stage = yaml.safe_load((package / "dvc.yaml").read_text())["stages"]["mistakes"]
    _, *arguments = stage["cmd"].split()
    done = python(package, *arguments)
    assert done.returncode == 0, done.stderr
    listed = json.loads((package / "experiments/mistakes/questions.json").read_text())
    assert [question["id"] for question in listed["questions"]] == ["q1"]
    assert all((package / path).exists() for path in stage["deps"])
