"""The latency and prefill stages in a folder of their own, on a tiny model of the micro world's classes."""

import json
import runpy
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

from atr import config
from atr.core.tokens import budget
from atr.micro.model import build_model, build_processor
from atr.reduction import FeatureSelector
from atr.stages import DISTILLED, LATENCY, PREFILL, SELECTOR, latency, prefill

ROOT = Path(__file__).parents[2]
SIZE, WIDTH, GRID, TOKENS = 56, 64, (4, 4), 16


@pytest.fixture
def logged(tmp_path, monkeypatch):
    """A project with a model and a selector; what is logged, by step."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    processor, model = build_processor(["total"], SIZE), Path("data/micro/llava")
    build_model(processor, SIZE, WIDTH, layers=1).save_pretrained(model)
    processor.save_pretrained(model)
    for folder in (SELECTOR, DISTILLED):
        FeatureSelector(WIDTH, GRID, layers=1, heads=1, layer=-1).save_pretrained(folder)
    params = OmegaConf.load(ROOT / "params.yaml")
    params.trainer.update({"accelerator": "cpu", "precision": "32-true"})
    params.latency.update({"kept": [0.25, 0.5], "batches": [1, 2], "seconds": 0.001})
    OmegaConf.save(params, "params.yaml")
    steps = {}
    log = SimpleNamespace(
        metrics=lambda values, step: steps.update({step: steps.get(step, {}) | values}),
        artifact=lambda *_: None,
    )
    monkeypatch.setattr("atr.core.tracking.run", lambda *_, **__: nullcontext(log))
    return steps


def run(reducer):
    latency.main(config.load("latency"), reducer)
    return json.loads((LATENCY / reducer / "metrics.json").read_text())


@pytest.mark.parametrize("reducer", ["random", "selector", "distilled", "class_attention"])
def test_a_reducer_is_timed_at_every_kept_fraction_and_batch(logged, reducer):
    results = run(reducer)
    assert set(results) == {
        "reducer", "device", "entries", "left_out", "parameters", "provenance", "resolved",
    }  # fmt: skip
    assert results["resolved"]["vlm"]["digest"] and results["resolved"]["device"] == "cpu"
    assert "CPU" in results["device"] and results["device"].endswith("32-true")
    keys = ("reducer", "tokens", "kept", "batch")
    assert [tuple(entry[key] for key in keys) for entry in results["entries"]] == [
        (reducer, TOKENS, kept, batch) for batch in (1, 2) for kept in (4, 8)
    ]
    assert all(entry["milliseconds"] > 0 for entry in results["entries"]) and results["left_out"] == ""
    assert results["parameters"] == config.load("latency").raw() and results["provenance"]["versions"]
    assert logged[4][f"{reducer}/batch 1/milliseconds"] == results["entries"][0]["milliseconds"]


@pytest.mark.parametrize(
    "reducer, reason",
    [
        ("full", "takes no budget"),
        ("selector_adaptive", "takes no budget"),
        ("fastv", "chooses between the layers of a language model"),
    ],
)
def test_a_reducer_that_cannot_be_timed_says_why(logged, reducer, reason):
    results = run(reducer)
    assert (results["entries"], results["left_out"]) == ([], reason)
    assert not logged


def test_the_prefill_is_timed_for_all_tokens_and_for_those_kept(logged):
    prefill.main(config.load("prefill"))
    results = json.loads((PREFILL / "metrics.json").read_text())
    assert set(results) == {"device", "prefill", "parameters", "provenance", "resolved"}
    assert [(entry["batch"], entry["tokens"]) for entry in results["prefill"]] == [
        (batch, tokens) for batch in (1, 2) for tokens in (4, 8, TOKENS)
    ]
    assert all(entry["milliseconds"] > 0 for entry in results["prefill"])
    assert {step: len(values) for step, values in logged.items()} == {4: 2, 8: 2, TOKENS: 2}


def test_a_selector_of_other_features_is_refused_before_anything_is_timed(logged, monkeypatch):
    monkeypatch.setattr("atr.core.timing.Timer", None)
    FeatureSelector(WIDTH, GRID, layers=1, heads=1, layer=-2).save_pretrained(SELECTOR)
    with pytest.raises(ValueError, match=r"^the selector was trained on layer -2 .* reads layer -1"):
        run("selector")
    assert not LATENCY.exists()


@pytest.fixture(params=["qwen2_5_vl", "internvl"])
def ruled(request, logged, monkeypatch):
    """The same project with a model of the rule; the model type."""
    runpy.run_path(str(ROOT / "tests/checkpoints.py"))["write"](Path("vlm"), request.param)
    params = OmegaConf.load("params.yaml")
    params.update({"encoder": "./vlm", "vlm": "./vlm"})
    OmegaConf.save(params, "params.yaml")
    monkeypatch.setattr("atr.vlm.latency.PICTURE", (96, 64))
    return request.param


def test_a_family_of_the_rule_is_timed_or_the_reducer_left_out_by_name(ruled, logged):
    prefill.main(config.load("prefill"))
    times = json.loads((PREFILL / "metrics.json").read_text())["prefill"]
    tokens = max(entry["tokens"] for entry in times)
    for reducer in ("class_attention", "tome"):
        results = run(reducer)
        if (reducer, ruled) == ("tome", "internvl"):
            assert results["left_out"] == "cannot serve internvl, which cuts images into tiles"
            assert results["entries"] == [] and results["resolved"] == {}
        else:
            counts = {(entry["batch"], entry["tokens"], entry["kept"]) for entry in results["entries"]}
            assert counts == {
                (batch, tokens, budget(kept, tokens)) for batch in (1, 2) for kept in (0.25, 0.5)
            }
            assert {kept for _, _, kept in counts} <= {entry["tokens"] for entry in times}
