import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from atr import config
from atr.config import stages
from atr.core import catalog

ROOT = Path(__file__).parents[2]
ONE_HEAD = {"pretrain__heads": 1, "distill__heads": 1}
"""A divisor of every encoder's width."""
TILED = ("llava-next", "llava-onevision")
"""Experiments whose model cuts images into tiles."""
HEAVY = {"torch", "lightning", "transformers", "mlflow", "pandas", "sklearn", "matplotlib"}


@pytest.mark.parametrize(("key", "name"), [("reducers", "tome"), ("selectors", "selector_mmr")])
def test_a_reducer_that_takes_no_tiles_is_refused_where_the_model_cuts_them(write, message, key, name):
    first = {"reducers": "full", "selectors": "selector"}[key]
    changes = {f"evaluate__{key}": [first, name], **ONE_HEAD}
    text = message(write(encoder="clip-vit-large-patch14-336", **changes))
    assert text.startswith(f"evaluate.{key}: ['{first}', '{name}'] is out of range, allowed: {first}, ")
    assert f", as {name} cannot serve llava_next, which cuts images into tiles" in text
    whole = write(encoder="clip-vit-large-patch14-336", vlm="llava-1.5-7b", **changes)
    assert name in config.load("report", whole).evaluate.names


@pytest.mark.parametrize("name", config.VLMS)
def test_the_reducers_that_serve_a_model_are_those_of_its_family(name):
    vlm = config.VLMS[name]
    left_out = set(catalog.reducers()) - set(stages.serving(catalog.reducers(), vlm))
    traits = {reducer: catalog.reducer_traits(reducer) for reducer in catalog.reducers()}
    of_one_tile = {reducer for reducer in traits if traits[reducer].one_tile}
    inside = {reducer for reducer in traits if traits[reducer].inside_llm}
    assert (of_one_tile if vlm.tiles > 1 else set()) <= left_out
    if vlm.model_type.startswith("llava"):
        assert left_out == (of_one_tile if vlm.tiles > 1 else set())
    else:
        assert inside and inside <= left_out


def test_a_reducer_that_a_model_of_the_users_own_folder_cannot_have_is_refused(tmp_path, write, message):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/config.json").write_text('{"model_type": "qwen2_5_vl"}')
    changes = {"encoder": str(tmp_path / "mine"), "vlm": str(tmp_path / "mine")}
    text = message(write(evaluate__reducers=["full", "fastv"], **changes))
    assert text.endswith(", as fastv prunes inside the language model, which qwen2_5_vl does not serve")
    (tmp_path / "mine/config.json").write_text("{")
    assert config.load("report", write(evaluate__reducers=["full", "fastv"], **changes))


@pytest.mark.parametrize("reducers", [["full"], ["full", "none"], ["full", "random"], ["full", "tome"]])
def test_the_lines_of_the_paper_but_for_all_tokens_may_be_left_out(write, reducers):
    assert config.load("report", write(evaluate__reducers=reducers)).evaluate.reducers == reducers


@pytest.mark.parametrize("name", ["llava-next", "llava-onevision", "qwen3-vl", None])
def test_make_compare_takes_all_that_serve_the_model(tmp_path, write, name):
    """The recipe as it stands, with a dvc that only prints its arguments."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    params = write(**(config.read(ROOT / f"experiments/{name}.yaml") if name else {}))
    programs = tmp_path / ".venv/bin"
    programs.mkdir(parents=True)
    for program, does in (("python", f'exec "{sys.executable}" "$@"'), ("dvc", 'printf "%s\\n" "$@"')):
        (programs / program).write_text(f"#!/bin/sh\n{does}\n")
        (programs / program).chmod(0o755)
    run = subprocess.run(
        ["make", "--silent", "compare", "STAMP=params.yaml"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    every = {
        "reducers": catalog.untrained(),
        "selectors": catalog.trained("pretrain"),
        "distilled": catalog.trained("distill"),
    }
    vlm = config.load("evaluate", params).vlm
    serving = {key: stages.serving(names, vlm) for key, names in every.items()}
    assert ("fastv" in serving["reducers"]) == (name != "qwen3-vl")
    assert ("tome" in serving["reducers"]) == (name not in (*TILED, "qwen3-vl"))
    expected = [f"evaluate.{key}=[{','.join(names)}]" for key, names in serving.items()]
    assert run.stdout.split() == ["exp", "run", *(word for each in expected for word in ("-S", each))]


def test_a_stage_stops_in_two_seconds_with_one_line_and_nothing_heavy_loaded(tmp_path, write):
    write(pretrain__keep=1.5)
    script = f"""
import sys, time
start = time.perf_counter()
from atr import config
try:
    config.load_or_exit("pretrain")
finally:
    seconds = time.perf_counter() - start
    print(sorted({HEAVY} & set(sys.modules)), seconds < 2)
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr == "atr pretrain: pretrain.keep: 1.5 is out of range, allowed: 0 < keep < 1\n"
    assert done.stdout == "[] True\n"


@pytest.mark.parametrize("module", sorted(path.stem for path in (ROOT / "atr/stages").glob("[!_]*.py")))
def test_every_stage_checks_its_parameters_before_it_loads_anything(tmp_path, write, module):
    """The stage as DVC starts it; `-X importtime` tells what was loaded."""
    write(pretrain__keep=1.5)
    command = [sys.executable, "-X", "importtime", "-m", f"atr.stages.{module}"]
    arguments = {"extract": ["pretrain"]}.get(module, ["full"] if takes_a_name(module) else [])
    done = subprocess.run(
        [*command, *arguments], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    loaded = {
        line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time")
    }
    lines = [line for line in done.stderr.splitlines() if not line.startswith("import time")]
    assert done.returncode == 2
    assert lines == [f"atr {module}: pretrain.keep: 1.5 is out of range, allowed: 0 < keep < 1"]
    assert not loaded & HEAVY


def takes_a_name(module):
    text = (ROOT / f"atr/stages/{module}.py").read_text()
    return "add_argument(" in text or "entry_of_reducer(" in text
