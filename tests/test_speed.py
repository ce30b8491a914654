"""The scripts of benchmarks/ on sizes that take no time: what they print, not how fast."""

import json
import os
import re
import runpy
import subprocess
from importlib import import_module
from pathlib import Path

import pytest
import torch
import yaml

from atr.vlm.inputs import Prompts

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """As `python -m benchmarks.x` has it in the root of the project."""
    monkeypatch.syspath_prepend(ROOT)


def printed(script, capsys, *arguments):
    import_module(f"benchmarks.{script}").main(list(arguments))
    return capsys.readouterr().out.splitlines()


def test_selection_prints_a_row_for_every_reducer_and_budget(capsys):
    from atr.reduction.registry import built_in_names

    small = ("--sides", "2", "4", "--width", "64", "--keep", "0.25", "0.5", "--seconds", "0.001")
    device, header, *lines = printed("selection", capsys, *small, "--batch", "2", "--device", "cpu")
    assert "width 64, batch 2" in device and header.split()[:3] == ["reducer", "N", "K"]
    rows = [line.split() for line in lines]
    names = set(built_in_names()) - {"full", "none", "fastv", "pyramiddrop"}
    assert {tuple(row[:3]) for row in rows} == {
        (name, str(tokens), str(tokens * part // 4))
        for name in names
        for tokens in (4, 16)
        for part in (1, 2)
    }
    assert all(float(row[4]) == 1 for row in rows if row[0] == "selector")
    assert all(float(time) >= 0 for row in rows for time in row[3:])


def test_seeds_prints_the_widths_by_number_of_seeds(capsys, tmp_path):
    synthetic = runpy.run_path(str(ROOT / "tests/reporting/synthetic.py"))
    synthetic["write"](tmp_path, questions=40, reducers=("full", "random", "selector", "l2_norm"))
    header, *lines = printed("seeds", capsys, "--experiments", str(tmp_path), "--best", "l2_norm")
    assert header.split()[2:] == [*map(str, synthetic["KEEPS"]), "widest"]
    rows = [re.split(r" {2,}", line) for line in lines if line.startswith("docs")]
    assert [row[1] for row in rows] == [
        "selector", "l2_norm",
        *(f"random, {seeds} seed(s)" for seeds in (1, 2, 3)),
        *(f"l2_norm - random, {seeds} seed(s)" for seeds in (1, 2, 3)),
    ]  # fmt: skip
    widths = {row[1]: [float(number) for number in row[2:]] for row in rows}
    assert all(max(values[:-1]) == values[-1] > 0 for values in widths.values())
    assert sum(widths["random, 3 seed(s)"]) < sum(widths["random, 1 seed(s)"])


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["distill"], "rows: distill cannot be measured without --against, allowed: store, step, generate"),
        (
            ["store", "--against", "."],
            "rows: store cannot be measured with --against, allowed: extract, pretrain",
        ),
    ],
)
def test_rows_without_what_they_need_are_refused(arguments, problem, capsys):
    with pytest.raises(SystemExit, match="2"):
        import_module("benchmarks.pipeline").main(arguments)
    assert problem in capsys.readouterr().err


STAGE = """
import json, os, pathlib, sys

results = pathlib.Path("experiments")
call = {
    "who": "WHO", "stage": "STAGE", "arguments": sys.argv[1:], "params": open("params.yaml").read(),
    "selector": (results / "pretrain/selector/model.safetensors").is_file(),
    "resumable": (results / "unfinished").exists(), "micro": pathlib.Path("data/micro/llava").is_dir(),
}
with open(os.environ["CALLS"], "a") as file:
    print(json.dumps(call), file=file)
(results / "unfinished").mkdir()
if "STAGE" == "FAILING":
    sys.exit("atr STAGE: it failed")
"""


def write_checkout(folder, who, failing=""):
    """Another build, whose stages note how they were called, and have a parameter that ours lack."""
    (folder / "data/micro/llava").mkdir(parents=True)
    (folder / "atr/stages").mkdir(parents=True)
    (folder / "atr/stages/__init__.py").touch()
    (folder / "atr/__init__.py").write_text("def reduce(): ...\n")
    for stage in ("prepare", "extract", "pretrain", "distill", "evaluate"):
        text = STAGE.replace("STAGE", stage).replace("WHO", who).replace("FAILING", failing)
        (folder / f"atr/stages/{stage}.py").write_text(text)
    (folder / "params.yaml").write_text("evaluate: {own_key: 1, keep: [.5]}\nprepare: {images: 9}\n")
    return folder


def calls_of(path):
    calls = [json.loads(line) for line in path.read_text().splitlines()]
    return [call | {"params": yaml.safe_load(call["params"])} for call in calls]


def test_stages_of_two_checkouts_run_in_turns_in_folders_of_their_own(tmp_path, monkeypatch, capsys):
    against = import_module("benchmarks.against")
    monkeypatch.setattr(against, "ROOT", write_checkout(tmp_path / "this", "this"))
    shipped = tmp_path / "this/data/micro/selectors/selector"
    shipped.mkdir(parents=True)
    (shipped / "model.safetensors").touch()
    other = write_checkout(tmp_path / "other", "other")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    arguments = ("evaluate", "--against", str(other), "--device", "cpu")
    assert re.fullmatch(
        r"evaluate, one answer +-?[\d.]+ ms / -?[\d.]+ ms = \S+ \(\S+ to \S+\); CPU time \S+ \(\S+ to \S+\)",
        printed("pipeline", capsys, *arguments)[-1],
    )
    calls = calls_of(tmp_path / "calls")
    prepared = [("prepare", []), ("extract", ["pretrain"]), ("extract", ["evaluate"])]
    pair = [("evaluate", ["selector"])] * 2
    assert [(call["stage"], call["arguments"]) for call in calls] == [*prepared * 2, *pair * 2]
    assert [call["who"] for call in calls[6:]] == ["this", "this", "other", "other"]
    assert all(call["selector"] and call["micro"] and not call["resumable"] for call in calls)
    assert [len(call["params"]["evaluate"]["keep"]) for call in calls[6:]] == [9, 1] * 2
    assert all(call["params"]["evaluate"]["own_key"] == 1 for call in calls), "a key that others lack stays"
    sizes = {"images": against.IMAGES, "questions": against.QUESTIONS}
    assert all(call["params"]["prepare"] == sizes for call in calls)


def test_a_stage_that_fails_ends_the_comparison_with_its_error(tmp_path, monkeypatch):
    against = import_module("benchmarks.against")
    other = write_checkout(tmp_path / "other", "other", failing="extract")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    with pytest.raises(
        ValueError, match=r"other: -m atr\.stages\.extract pretrain: exit code 1: .*it failed$"
    ):
        against.Prepared.make(other, tmp_path / "folder")


def test_the_import_row_counts_what_comes_beyond_torch_and_transformers(tmp_path):
    against = import_module("benchmarks.against")
    checkout = write_checkout(tmp_path, "this")
    (checkout / "torch.py").write_text("")
    log = "print('torch' in sys.modules, file=open('log', 'a'))"
    text = f"import sys, time; {log}; time.sleep(0.1); import torch\ndef reduce(): ...\n"
    (checkout / "atr/__init__.py").write_text(text)
    assert against.import_library(checkout).wall > 0.1
    assert (checkout / "log").read_text().split() == ["False", "True"], "first to list, then to measure"


def test_reproduce_runs_the_pipeline_of_a_new_clone(tmp_path, monkeypatch):
    against = import_module("benchmarks.against")
    recipe = f"STAMP := missing\nreproduce: $(STAMP)\n\tpwd > {tmp_path}/ran\n"
    (tmp_path / "Makefile").write_text(recipe)
    names = {f"GIT_{who}_{what}": "atr" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    for command in ("git init -q", "git add .", "git commit -qm first"):
        subprocess.run(command.split(), cwd=tmp_path, env=os.environ | names, check=True)
    (tmp_path / "Makefile").write_text("reproduce:\n\tfalse\n")
    assert against.reproduce(tmp_path).wall > 0
    assert (tmp_path / "ran").read_text().strip() != str(tmp_path)


def test_rounds_alternate_and_ratios_show_their_spread():
    timing = import_module("benchmarks.timing")
    order = []

    def side(name, factor):
        return lambda: order.append(name) or timing.Seconds(factor * len(order), factor)

    this, other = timing.alternate([side("this", 1.0), side("other", 2.0)], 2)
    assert order == ["this", "other"] * 2
    assert this == [(1.0, 1.0), (3.0, 1.0)] and other == [(4.0, 2.0), (8.0, 2.0)]
    assert timing.ratio_text(this, other) == "0.312 (0.250 to 0.375); CPU time 0.500 (0.500 to 0.500)"
    assert timing.Seconds(5.0, 3.0).per_unit(timing.Seconds(1.0, 1.0), 4) == (1.0, 0.5)


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_throughput_asks_both_sides_the_same(family, monkeypatch, capsys):
    throughput = import_module("benchmarks.throughput")
    monkeypatch.setattr(throughput, "their_side", throughput.our_side)
    small = ("--per-image", "2", "--questions", "2", "--rounds", "1", "--width", "64", "--layers", "1")
    *_, size, row = printed("throughput", capsys, "--families", family, *small)
    assert re.fullmatch(rf"{family}, language model of [\d.]+M parameters", size)
    assert re.fullmatch(r" +2 per image: .* questions/s = .*; 2 of 2 answers equal", row)


def test_answers_of_the_random_models_have_their_full_length(tmp_path):
    from atr.vlm.checkpoint import load_vlm

    throughput = import_module("benchmarks.throughput")
    throughput.write_random_llava(tmp_path, "llava", width=64, layers=1)
    images, questions = throughput.draw_questions(1, 3, 336)
    answers = throughput.our_side(tmp_path, images)(questions)
    assert [len(answer.split()) for answer in answers] == [throughput.SETTINGS.max_new_tokens] * 3
    processor = load_vlm(str(tmp_path), torch.float32)[1]
    message = {"role": "user", "content": "<image>\nword1"}
    prompt = processor.tokenizer.apply_chat_template([message], tokenize=False)
    assert prompt == Prompts(processor).text("word1", 1), "lmms-eval writes the placeholder itself"


@pytest.mark.slow
def test_pipeline_prints_each_ratio_with_its_two_times(capsys):
    small = ("--images", "8", "--steps", "8", "--keep", "0.5", "--batch", "2", "--seconds", "0.001")
    _, *lines = [line for line in printed("pipeline", capsys, *small, "--device", "cpu") if line]
    rows = [match for line in lines if (match := re.match(r"(.+?) +([\d.]+) ms / +([\d.]+) ms = (.+)", line))]
    assert [row[1] for row in rows] == [
        "store / plain file", "step / plain loop", "generate from 0.5 / from all",
    ]  # fmt: skip
    for row in rows:
        assert float(row[4]) == pytest.approx(float(row[2]) / float(row[3]), rel=0.05)


def test_coverage_prints_a_row_for_every_size_batch_and_budget(capsys):
    small = ("--tokens", "9", "230", "--width", "16", "--keep", "0.1", "0.5", "--batch", "1", "4")
    device, header, *lines = printed("coverage", capsys, *small, "--rounds", "1")
    assert "width 16" in device and header.split()[:3] == ["N", "B", "K"]
    rows = [line.split() for line in lines]
    assert [row[:3] for row in rows] == [
        [tokens, images, kept]
        for tokens, counts in (("9", ("1", "5")), ("230", ("23", "115")))
        for images in ("1", "4")
        for kept in counts
    ]
    assert all(float(number) > 0 for row in rows for number in row[3:7])
    plain, ours = map(float, rows[-1][-2:])
    assert ours < plain, "one image's cosines at a time"
