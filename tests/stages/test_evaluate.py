"""The evaluate stage in a folder of its own, on a tiny model of the micro world's classes."""

import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from atr import config
from atr.config import presets
from atr.core import catalog
from atr.core.answer_files import load_rows
from atr.core.files import sha256, write_json
from atr.core.hub import checkpoint_digest
from atr.core.records import Question
from atr.core.tracking import current_provenance
from atr.datasets.questions import save_questions
from atr.features.preprocess import describe_preprocessing
from atr.features.store import ShardWriter, write_manifest
from atr.micro.model import build_model, build_processor
from atr.reduction import FeatureSelector
from atr.reporting import result_files
from atr.stages import (
    EVALUATE,
    EVALUATE_FEATURES,
    EVALUATE_IMAGES,
    SELECTOR,
    UNFINISHED,
    Terminated,
    evaluate,
    unfinished,
)
from atr.vlm.generation import Generator

ROOT = Path(__file__).parents[2]
SIZE, WIDTH, GRID, TOKENS = 56, 64, (4, 4), 16
KEEP = (0.2, 0.5)
MODEL = presets.VLMS["micro"].path
COMPUTED = {"precision": "bf16-mixed", "device": "cuda"}
IMAGES = [f"{benchmark}/{number}" for benchmark in ("docs", "signs", "shapes") for number in range(4)]
QUESTIONS = [
    Question(f"{image}#{turn}", name, catalog.benchmark_group(name), [image], text, ["17"])
    for image in IMAGES
    for name in [image.split("/")[0]]
    for turn, text in enumerate(("total", "name of page"))
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model, features, questions and a selector, as the stages before leave them."""
    folder = tmp_path_factory.mktemp("project")
    torch.manual_seed(0)
    processor = build_processor(["total", "name", "of", "page"], SIZE)
    build_model(processor, SIZE, WIDTH, layers=1, text_layers=3).save_pretrained(folder / MODEL)
    processor.save_pretrained(folder / MODEL)
    save_store(folder / EVALUATE_FEATURES)
    save_questions(folder / EVALUATE_IMAGES, QUESTIONS)
    selector = FeatureSelector(WIDTH, GRID, layers=1, heads=1)
    torch.nn.init.normal_(selector.trunk.head.weight)
    selector.save_pretrained(folder / SELECTOR)
    return folder


def save_store(folder, layer=-1):
    folder.mkdir(parents=True, exist_ok=True)
    writer = ShardWriter(folder, len(IMAGES), shard_images=8)
    features_BND = torch.randn(len(IMAGES), TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))
    for first in (0, 8):
        writer.add(first, IMAGES[first : first + 8], features_BND[first : first + 8])
    write_manifest(
        folder,
        encoder="micro",
        layer=layer,
        grid=GRID,
        width=WIDTH,
        preprocess=describe_preprocessing(build_processor(["total"], SIZE).image_processor),
        parameters={"encoder": "micro"},
        shards=writer.shards,
        resolved=COMPUTED,
    )


@pytest.fixture
def project(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for part in ("data", "experiments/pretrain"):
        Path(part).parent.mkdir(exist_ok=True)
        Path(part).symlink_to(trained / part)
    write_params()
    log = SimpleNamespace(metrics=lambda *_: None, artifact=lambda *_: None)
    monkeypatch.setattr("atr.core.tracking.run", lambda *_, **__: nullcontext(log))
    return tmp_path


def write_params(**changed):
    params = OmegaConf.load(ROOT / "params.yaml")
    params.trainer.accelerator = "cpu"
    params.evaluate.update({"keep": list(KEEP), "random_seeds": 2, "max_new_tokens": 3})
    for key, value in changed.items():
        OmegaConf.update(params, f"{'evaluate' if key in params.evaluate else 'trainer'}.{key}", value)
    OmegaConf.save(params, "params.yaml")


def run(reducer, anew=True):
    if anew:
        shutil.rmtree(UNFINISHED, ignore_errors=True)
    evaluate.main(config.load("evaluate"), reducer)
    summary, masks = (
        json.loads((EVALUATE / reducer / f"{name}.json").read_text()) for name in ("summary", "masks")
    )
    return stored_rows(reducer), summary, masks


def stored_rows(reducer):
    """The rows of an evaluation as dictionaries, by question and then by trial."""
    rows = load_rows(EVALUATE / reducer / "results.jsonl")
    return [asdict(row) | {"image": row.image} for row in rows]


def test_results_record_how_they_were_computed(project, trained):
    write_params(precision="32-true")
    resolved = run("full")[1]["resolved"]
    assert (resolved["precision"], resolved["device"], resolved["attention"]) == ("32-true", "cpu", "sdpa")
    assert resolved["vlm"] == {"commit": None, "digest": checkpoint_digest(str(trained / MODEL))}
    assert resolved["features"] == COMPUTED
    write_params(precision="bf16-mixed")
    assert run("full")[1]["resolved"] == resolved | {"precision": "bf16-mixed"}


@pytest.mark.parametrize(
    "reducer, trials",
    [
        ("full", [(1.0, None, 16)]),
        ("none", [(0.0, None, 0)]),
        ("random", [(0.2, 0, 3), (0.2, 1, 3), (0.5, 0, 8), (0.5, 1, 8)]),
        ("selector", [(0.2, None, 3), (0.5, None, 8)]),
    ],
)
def test_every_question_is_answered_once_at_every_budget(project, reducer, trials):
    rows, summary, masks = run(reducer)
    assert [(row["keep"], row["seed"], row["tokens"], row["id"]) for row in rows] == [
        (*trial, question.id) for question in QUESTIONS for trial in trials
    ]
    assert (summary["reducer"], summary["encoder"], summary["vlm"], summary["tokens_full"]) == (
        reducer, "micro", "micro", TOKENS,
    )  # fmt: skip
    names = [score.get("benchmark") or score["group"] for score in summary["scores"]]
    budgets = len({keep for keep, _, _ in trials})
    assert sorted(names) == sorted(["docs", "signs", "shapes", "text", "general"] * budgets)
    assert all(0 <= score["low"] <= score["mean"] <= score["high"] <= 1 for score in summary["scores"])
    assert {score["seeds"] for score in summary["scores"]} == {len(trials) // budgets}
    shown = min(trials, key=lambda trial: abs(trial[0] - 0.4))
    assert (masks["grid"], masks["keep"]) == (list(GRID), shown[0])
    assert list(masks["masks"]) == ["docs/0", "docs/1", "docs/2", "signs/0", "signs/1", "signs/2"]
    assert {len(kept) for kept in masks["masks"].values()} == {shown[2]}


def test_the_log_has_the_summary_alone_which_refers_to_the_answers(project, monkeypatch):
    logged = []
    log = SimpleNamespace(metrics=lambda *_: None, artifact=logged.append)
    monkeypatch.setattr("atr.core.tracking.run", lambda *_, **__: nullcontext(log))
    _, summary, _ = run("full")
    folder = EVALUATE / "full"
    assert logged == [folder / "summary.json"]
    assert summary["files"] == {name: sha256(folder / name) for name in ("masks.json", "results.jsonl")}


def test_the_same_run_gives_the_same_bytes(project):
    files = [EVALUATE / "random" / name for name in ("results.jsonl", "summary.json", "masks.json")]
    contents = []
    for _ in range(2):
        run("random")
        contents.append([file.read_bytes() for file in files])
    assert contents[0] == contents[1]


def test_the_random_reducer_has_seeds_of_its_own(project):
    rows, _, masks = run("random")
    params = OmegaConf.load("params.yaml")
    params.seed = 7
    OmegaConf.save(params, "params.yaml")
    assert run("random")[::2] == (rows, masks)


@pytest.mark.parametrize(
    "reducer, trials, below",
    [("fastv", [(0.75, 12)], "0.2, 0.5"), ("pyramiddrop", [(0.5, 8), (0.75, 12)], "0.2")],
)
def test_budgets_that_layers_cannot_reach_are_left_out_and_named(project, capsys, reducer, trials, below):
    """Of three layers FastV leaves 16, 16 and 4 tokens; PyramidDrop 16, 6 and 2, or 16, 12 and 8."""
    write_params(keep=[*KEEP, 0.75])
    rows, summary, masks = run(reducer)
    assert [(row["keep"], row["tokens"], row["id"]) for row in rows] == [
        (*trial, question.id) for question in QUESTIONS for trial in trials
    ]
    assert {row["status"] for row in rows} == {"answered"} and summary["tokens_full"] == TOKENS
    assert masks["keep"] == trials[0][0]
    last = {"fastv": 4, "pyramiddrop": 2}[reducer]
    assert {len(kept) for kept in masks["masks"].values()} == {last}
    line = f"{reducer} cannot keep as few as {below}: left out"
    assert capsys.readouterr().err.count(line) == 1


def test_no_question_is_answered_if_no_budget_can_be_reached(project):
    with pytest.raises(ValueError, match=r"keep: 0\.5 is out of reach of FastV in 3 layers, .* 0\.688 and"):
        run("fastv")
    assert not EVALUATE.exists()


@pytest.mark.parametrize(
    "missing, reducer, message",
    [
        ("data/prepared/evaluate/questions.jsonl", "full", "questions.jsonl is missing"),
        ("data/features/evaluate/manifest.json", "full", "manifest.json is missing"),
        ("experiments/pretrain/selector/model.safetensors", "selector", "model.safetensors is missing"),
    ],
)
def test_a_missing_file_of_an_earlier_stage_is_named(project, monkeypatch, missing, reducer, message):
    moved = Path(missing).resolve()
    aside = moved.with_name("aside")
    moved.rename(aside)
    try:
        with pytest.raises(ValueError, match=message):
            run(reducer)
    finally:
        aside.rename(moved)
    assert not EVALUATE.exists()


def test_features_of_another_layer_are_refused(project, trained):
    save_store(trained / EVALUATE_FEATURES, layer=1)
    run("none")  # layer 1 of one layer is the last one
    save_store(trained / EVALUATE_FEATURES, layer=-2)
    try:
        with pytest.raises(ValueError, match="of layer -2, the model reads layer -1"):
            run("none")
    finally:
        save_store(trained / EVALUATE_FEATURES)


def test_a_failure_leaves_the_former_results_whole(project, monkeypatch):
    run("full")
    former = {file.name: file.read_bytes() for file in (EVALUATE / "full").iterdir()}
    monkeypatch.setattr("atr.vlm.generation.Generator._generate", lambda *_: 1 / 0)
    with pytest.raises(RuntimeError, match=r"no answer to docs/0#0"):
        run("full")
    assert {file.name: file.read_bytes() for file in (EVALUATE / "full").iterdir()} == former
    assert [path.name for path in EVALUATE.iterdir()] == ["full"]


class Watched:
    """Generator.prepare: records its images, and stops as on Ctrl-C after `most` batches."""

    def __init__(self, monkeypatch):
        self.seen, self.most, real = [], None, Generator.prepare

        def watched(generator, images, *others, **needs):
            if len(self.seen) == self.most:
                raise KeyboardInterrupt
            self.seen.append(images)
            return real(generator, images, *others, **needs)

        monkeypatch.setattr(Generator, "prepare", watched)

    def run(self, most=None):
        self.seen, self.most = [], most
        with pytest.raises(KeyboardInterrupt) if most else nullcontext():
            run("random", anew=False)
        return self.seen


def test_a_resumed_evaluation_gives_the_bytes_of_an_uninterrupted_one(project, monkeypatch):
    write_params(batch_tokens=40)
    watched = Watched(monkeypatch)
    every = watched.run()
    whole = {file.name: file.read_bytes() for file in (EVALUATE / "random").iterdir()}
    shutil.rmtree(UNFINISHED)
    assert watched.run(most=2) == every[:2]
    assert watched.run() == every[2:] != []
    assert {file.name: file.read_bytes() for file in (EVALUATE / "random").iterdir()} == whole


@pytest.mark.parametrize("moment", ["evaluate.write_json", "evaluate.whole_folder", None])
def test_answers_stay_until_their_results_cannot_be_lost_any_more(project, monkeypatch, moment):
    """Stopped between the answers and its end, or by DVC's end after its own, it asks nothing again."""
    watched = Watched(monkeypatch)
    assert watched.run() != []
    whole = {file.name: file.read_bytes() for file in (EVALUATE / "random").iterdir()}
    shutil.rmtree(UNFINISHED)
    with monkeypatch.context() as patch:
        if moment:
            patch.setattr(f"atr.stages.{moment}", lambda *_: (_ for _ in ()).throw(Terminated))
        with pytest.raises(Terminated) if moment else nullcontext():
            run("random", anew=False)
    shutil.rmtree(EVALUATE, ignore_errors=True)  # as DVC does before it runs the stage again
    assert watched.run() == []
    assert {file.name: file.read_bytes() for file in (EVALUATE / "random").iterdir()} == whole


def test_a_finished_evaluation_removes_unfinished_rows_of_its_reducer(project, monkeypatch):
    write_params(batch_tokens=40)
    watched = Watched(monkeypatch)
    watched.run(most=1)
    (former,) = (UNFINISHED / "random").iterdir()
    write_params(batch_tokens=40, max_new_tokens=2)
    watched.run(most=1)
    assert former.exists()
    watched.run()
    assert not former.exists() and len(list((UNFINISHED / "random").iterdir())) == 1


def test_an_interrupted_evaluation_of_other_parameters_is_not_resumed(project, monkeypatch):
    write_params(batch_tokens=40)
    watched = Watched(monkeypatch)
    first = watched.run(most=2)
    write_params(batch_tokens=40, max_new_tokens=2)
    assert watched.run()[:2] == first


def other_weights(folder):
    model = AutoModelForImageTextToText.from_pretrained(folder)
    with torch.no_grad():
        for weight in model.model.language_model.parameters():
            weight.copy_(torch.randn_like(weight))
    return model


def test_answers_of_another_model_are_not_resumed(project, monkeypatch):
    """A model in shards, saved again with other weights: nothing but the shards changes."""
    model = Path(shutil.copytree(MODEL, "model"))
    shard = {"max_shard_size": "100KB"}
    other = other_weights(model)
    AutoModelForImageTextToText.from_pretrained(model).save_pretrained(model, **shard)
    (model / "model.safetensors").unlink(missing_ok=True)
    assert len(list(model.glob("*.safetensors"))) > 1
    write_params(batch_tokens=40)
    params = OmegaConf.load("params.yaml")
    params.vlm = "./model"
    OmegaConf.save(params, "params.yaml")
    watched = Watched(monkeypatch)
    watched.run(most=2)
    before = {file.name: file.read_bytes() for file in model.iterdir()}
    other.save_pretrained(model, **shard)
    changed = {name for name, content in before.items() if (model / name).read_bytes() != content}
    assert changed and all(name.endswith(".safetensors") for name in changed)
    watched.run()
    mixed = (EVALUATE / "random/results.jsonl").read_bytes()
    shutil.rmtree(EVALUATE)
    watched.run()
    assert (EVALUATE / "random/results.jsonl").read_bytes() == mixed


@pytest.mark.parametrize(
    "file",
    [
        f"{MODEL}/config.json",
        f"{MODEL}/generation_config.json",
        f"{MODEL}/tokenizer.json",
        f"{MODEL}/tokenizer_config.json",
        f"{MODEL}/chat_template.jinja",
        f"{MODEL}/processor_config.json",
        f"{EVALUATE_IMAGES}/questions.jsonl",
        f"{EVALUATE_IMAGES}/manifest.json",
        f"{EVALUATE_FEATURES}/manifest.json",
        f"{SELECTOR}/model.safetensors",
        f"{SELECTOR}/config.json",
    ],
)
def test_unfinished_answers_have_another_name_when_any_file_changes(trained, tmp_path, monkeypatch, file):
    shutil.copytree(trained, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    write_params()
    params = config.load("evaluate")

    def name(reducer):
        return unfinished(params, reducer, provenance={}, resolved=checkpoint_digest(MODEL))

    before = {reducer: name(reducer) for reducer in ("selector", "random")}
    assert before == {reducer: name(reducer) for reducer in before}
    Path(file).write_bytes((Path(file).read_bytes() if Path(file).exists() else b"") + b" ")
    assert name("selector") != before["selector"]
    assert (name("random") == before["random"]) == file.startswith(str(SELECTOR))


def test_questions_that_cannot_be_answered_are_counted_and_leave_the_others_alone(project, trained):
    rows, summary, _ = run("random")
    unreadable = replace(QUESTIONS[0], images=[], unreadable="docs/0 is cut off")
    typed = replace(QUESTIONS[3], question="name of <image>")
    save_questions(trained / EVALUATE_IMAGES, [unreadable, *QUESTIONS[1:3], typed, *QUESTIONS[4:]])
    try:
        spoilt, counted, _ = run("random")
    finally:
        save_questions(trained / EVALUATE_IMAGES, QUESTIONS)
    lost = {QUESTIONS[0].id: "unreadable", QUESTIONS[3].id: "failed"}
    assert [row for row in spoilt if row["id"] not in lost] == [row for row in rows if row["id"] not in lost]
    assert {(row["id"], row["status"], row["score"]) for row in spoilt if row["id"] in lost} == {
        (*question, None) for question in lost.items()
    }
    assert counted["tokens_full"] == TOKENS
    for score in counted["scores"]:
        here = (1, 1) if "docs" in score.values() or "text" in score.values() else (0, 0)
        assert (score["unreadable"], score["failed"]) == here
        assert score["answered"] == score["questions"] - sum(here)
    assert {score["failed"] + score["unreadable"] for score in summary["scores"]} == {0}


def spoil_store(folder, image):
    """NaN into the stored features of an image, and a manifest that vouches for it."""
    manifest = json.loads((folder / "manifest.json").read_text())
    number, place = divmod(image, 8)
    shard = folder / manifest["shards"][number]["file"]
    features_SND = load_file(shard)["features"]
    features_SND[place, 5, 7] = torch.nan
    ids = json.dumps(IMAGES[8 * number : 8 * number + 8])
    save_file({"features": features_SND}, shard, {"ids": ids})
    manifest["shards"][number]["sha256"] = sha256(shard)
    write_json(folder / "manifest.json", manifest)


@pytest.mark.parametrize("reducer", ["selector", "random", "full"])
def test_a_question_about_features_that_are_not_finite_is_failed_and_says_why(project, trained, reducer):
    rows = run(reducer)[0]
    try:
        spoil_store(trained / EVALUATE_FEATURES, 1)
        spoilt = run(reducer)[0]
    finally:
        save_store(trained / EVALUATE_FEATURES)
    failed = [row for row in spoilt if row["image"] == IMAGES[1]]
    name = {"selector": "SelectorReducer", "random": "Random", "full": "Full"}[reducer]
    reason = f"ValueError: reducer {name}: features_BND of images [0] of 1 holds NaN or infinity"
    assert {(row["status"], row["score"], row["error"].split(",")[0]) for row in failed} == {
        ("failed", None, reason)
    }
    assert [row for row in spoilt if row not in failed] == [row for row in rows if row["image"] != IMAGES[1]]


@pytest.mark.parametrize("reducer", ["selector", "distilled", "distilled_ranking", "selector_mmr"])
def test_a_selector_that_ranks_nothing_ends_the_stage_before_any_answer(
    project, trained, monkeypatch, reducer
):
    broken = trained / "broken"
    shutil.copytree(trained / SELECTOR, broken, dirs_exist_ok=True)
    weights = load_file(broken / "model.safetensors")
    weights["trunk.head.bias"][0] = torch.nan
    save_file(weights, broken / "model.safetensors")
    for name in ("SELECTOR", "DISTILLED"):
        monkeypatch.setattr(f"atr.stages.{name}", broken)
    monkeypatch.setattr(Generator, "prepare", lambda *_, **__: pytest.fail("a question is asked"))
    with pytest.raises(ValueError, match=r"broken: no FeatureSelector .* NaN or infinity, first trunk.head"):
        run(reducer)
    assert not (EVALUATE / reducer).exists()


def test_questions_about_several_images_or_none_are_asked_too(project, trained):
    several = replace(QUESTIONS[3], images=[*QUESTIONS[3].images, "docs/0"])
    none = replace(QUESTIONS[0], images=[])
    save_questions(trained / EVALUATE_IMAGES, [none, *QUESTIONS[1:3], several, *QUESTIONS[4:]])
    try:
        rows, summary, _ = run("selector")
    finally:
        save_questions(trained / EVALUATE_IMAGES, QUESTIONS)
    assert {row["status"] for row in rows} == {"answered"}
    tokens = {(row["keep"], row["tokens"]) for row in rows if row["id"] == several.id}
    assert tokens == {(0.2, 6), (0.5, 16)}
    assert [(row["image"], row["tokens"]) for row in rows if row["id"] == none.id] == [("", 0)] * 2
    assert summary["tokens_full"] == TOKENS  # one has twice as many, one has none
    docs, shapes = (
        [score["tokens_full"] for score in summary["scores"] if score.get("benchmark") == name]
        for name in ("docs", "shapes")
    )
    assert (docs, shapes) == ([TOKENS, TOKENS], [TOKENS, TOKENS])


@pytest.mark.parametrize("reducer", ["selector_adaptive", "none", "full"])
def test_a_benchmark_without_images_has_a_score_like_any_other(project, trained, reducer):
    blind = [replace(question, images=[]) for question in QUESTIONS if question.benchmark == "docs"]
    save_questions(
        trained / EVALUATE_IMAGES, [*blind, *(one for one in QUESTIONS if one.benchmark != "docs")]
    )
    try:
        _, summary, _ = run(reducer)
    finally:
        save_questions(trained / EVALUATE_IMAGES, QUESTIONS)
    docs = next(score for score in summary["scores"] if score.get("benchmark") == "docs")
    assert (docs["tokens"], docs["tokens_full"], docs["answered"]) == (0, 0, len(blind))


def test_the_layout_is_recorded_with_the_results(project):
    write_params(newline="follow", budget="tile", interpolation="off")
    _, summary, _ = run("random")
    recorded = summary["parameters"]["evaluate"]
    assert (recorded["newline"], recorded["budget"], recorded["interpolation"]) == ("follow", "tile", "off")


@pytest.mark.parametrize(
    "place, reducer",
    [("SELECTOR", "selector"), ("DISTILLED", "distilled"), ("DISTILLED", "distilled_ranking")],
)
def test_a_selector_of_other_features_is_refused(project, trained, monkeypatch, place, reducer):
    """Each reducer is made of its own teacher's: the other one is of the right features."""
    right = trained / SELECTOR
    FeatureSelector(WIDTH, GRID, layers=1, heads=1, layer=-2).save_pretrained(trained / "other")
    for name in ("SELECTOR", "DISTILLED"):
        monkeypatch.setattr(f"atr.stages.{name}", trained / "other" if name == place else right)
    with pytest.raises(ValueError, match=r"^the selector was trained on layer -2 .* reads layer -1"):
        run(reducer)


def test_an_unknown_reducer_is_refused_before_any_import():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "atr.stages.evaluate", "clairvoyant"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert "argument reducer: 'clairvoyant' is unknown, allowed: full, none, random, " in done.stderr
    assert not re.search(r"\| +(torch|lightning|transformers)$", done.stderr, re.MULTILINE)


OWN = "my_package/my_module"


@pytest.fixture
def write_own(project, monkeypatch):
    """Write the user's own reducer, and name it in params.yaml."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path(OWN).parent.mkdir()

    def write(source):
        Path(f"{OWN}.py").write_text(source)
        for module in [name for name in sys.modules if name.startswith("my_package")]:
            del sys.modules[module]
        write_params(own=[OWN])

    yield write
    for module in [name for name in sys.modules if name.startswith("my_package")]:
        del sys.modules[module]


def test_the_report_reads_what_was_written(write_own, tmp_path):
    write_own((ROOT / "atr/reduction/peers/l2_norm.py").read_text())
    write_params(own=[OWN], keep=[*KEEP, 0.75])
    reducers = (*result_files.REQUIRED, "fastv", "pyramiddrop", OWN)
    for reducer in reducers:
        run(reducer)
    metrics = {"final": {}, "parameters": {}, "provenance": current_provenance(), "resolved": {}}
    write_json(tmp_path / "metrics.json", metrics)
    results = result_files.load_results(EVALUATE, tmp_path / "metrics.json", reducers)
    assert results.shared == [*KEEP, 0.75]
    assert [group.name for group in results.groups] == ["text", "general"]
    curves = results.groups[0].curves
    assert [score.keep for score in curves["fastv"]] == [0.75]
    assert [score.keep for score in curves[OWN]] == [*KEEP, 0.75]


@pytest.mark.parametrize("name", ["l2_norm", "random", "fastv"])
def test_the_users_copy_of_a_built_in_reducer_gives_its_results(write_own, name):
    write_own((ROOT / f"atr/reduction/peers/{name}.py").read_text())
    write_params(own=[OWN], keep=[0.5, 0.75])
    rows, summary, masks = run(OWN)
    expected_rows, expected, expected_masks = run(name)
    assert (rows, masks) == (expected_rows, expected_masks)
    assert (summary["reducer"], expected["reducer"]) == (OWN, name)
    assert summary["scores"] == expected["scores"]
    assert sorted(path.name for path in EVALUATE.iterdir()) == sorted([name, "my_package"])
    assert [path.name for path in (EVALUATE / "my_package").iterdir()] == ["my_module"]


WRONG = {
    "torch.arange(budget + 1)": r"kept indices have shape \(1, 5\), allowed: \(1, 4\)",
    "torch.arange(budget).flip(0)": "kept indices are out of order, allowed: raster order",
    "torch.zeros(budget).long()": "a token is kept twice",
    "torch.arange(budget) + encoded.tokens - 1": "kept index 16 is out of range, allowed: 0 to 15",
    "torch.arange(budget).float()": "kept indices are torch.float32, allowed: torch.int64",
}
REDUCER = """
import torch

class Mine:
    needs = frozenset()

    def __call__(self, encoded, budget):
        return ({kept}).repeat(len(encoded.features_BND), 1)
"""
MERGER = """
import torch

ONE_TILE = True

class Mine:
    needs = frozenset()

    def __call__(self, encoded, budget):
        return torch.arange(budget).repeat(len(encoded.features_BND), 1)

    def merge(self, encoded, budget):
        return self(encoded, budget), encoded.features_BND[:, :budget] * torch.nan
"""


@pytest.mark.parametrize(
    "source, message",
    [
        *((REDUCER.format(kept=kept), message) for kept, message in WRONG.items()),
        (MERGER, "merged features .*NaN"),
    ],
    ids=[*WRONG, "NaN features"],
)
def test_a_wrong_reducer_of_the_user_is_named_in_one_line_and_leaves_no_results(write_own, source, message):
    write_own(source)
    write_params(own=[OWN], keep=[0.25], batch_tokens=40)
    line = f"no answer to docs/0#0, .*: ValueError: reducer Mine: {message}"
    with pytest.raises(ValueError, match=line) as error:
        run(OWN)
    assert "\n" not in str(error.value)
    assert not EVALUATE.exists()


@pytest.mark.parametrize(
    "source, message",
    [
        (
            "import no_such_library",
            f"{OWN}.py: it cannot be imported: ModuleNotFoundError: ",
        ),
        ("class Mine: pass", rf"{OWN}.py: it has 0 reducers \(none\), allowed: a function build"),
        ("def build(seed=0): return 3", f"{OWN}.py: build returns a int, which is no reducer"),
    ],
)
def test_a_file_without_a_reducer_is_named_before_any_answer(write_own, monkeypatch, source, message):
    write_own(source)
    monkeypatch.setattr(Generator, "prepare", lambda *_, **__: pytest.fail("a question is asked"))
    with pytest.raises(ValueError, match=f"^{message}"):
        run(OWN)
    assert not EVALUATE.exists()


def test_answers_of_an_edited_reducer_are_not_resumed(write_own, monkeypatch):
    class Stop(Exception):
        pass

    names = []

    def load(unfinished_rows, ids):
        names.append(unfinished_rows.path)
        raise Stop

    monkeypatch.setattr("atr.core.answer_files.UnfinishedRows.load", load)
    for kept in ("torch.arange(budget)", "torch.arange(budget) + 1"):
        write_own(REDUCER.format(kept=kept))
        with pytest.raises(Stop):
            run(OWN)
    assert names[0].parent == names[1].parent == UNFINISHED / OWN
    assert names[0] != names[1]


@pytest.fixture
def run_command_line(warm_stages):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return lambda: warm_stages.run("-m", "atr.stages.evaluate", OWN, env=environment)


@pytest.mark.slow
def test_the_command_line_takes_a_reducer_of_the_user(write_own, run_command_line):
    """With the log of runs, where the name with a slash is a part of the run's name."""
    write_own(REDUCER.format(kept="torch.arange(budget)"))
    done = run_command_line()
    assert done.returncode == 0, done.stderr[-2000:]
    assert not [line for line in done.stderr.splitlines() if "not logged" in line]
    assert sorted(path.name for path in (EVALUATE / OWN).iterdir()) == [
        "masks.json", "results.jsonl", "summary.json",
    ]  # fmt: skip


def test_the_command_line_names_a_wrong_reducer_of_the_user(write_own, run_command_line):
    write_own(REDUCER.format(kept=next(iter(WRONG))))
    done = run_command_line()
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("atr evaluate: keep 0.5, seed None: no answer to docs/0#0")
    assert "Traceback" not in done.stderr and not EVALUATE.exists()


@pytest.mark.slow
@pytest.mark.timeout(900)  # three times the imports, on a machine that may be busy
def test_two_processes_give_the_rows_of_one(project, warm_stages):
    rows, _, masks = run("random")
    write_params(devices=2, strategy="ddp")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = warm_stages.run("-m", "atr.stages.evaluate", "random", env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert stored_rows("random") == rows
    assert json.loads((EVALUATE / "random" / "masks.json").read_text()) == masks
