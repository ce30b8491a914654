"""The cost stage in a folder of its own, on a tiny model of the micro world's classes."""

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

from atr import config
from atr.micro.model import build_model, build_processor
from atr.reduction import FeatureSelector
from atr.stages import DISTILLED, LATENCY, SELECTOR, latency

ROOT = Path(__file__).parents[2]
SIZE, WIDTH, GRID, TOKENS = 56, 64, (4, 4), 16


@pytest.fixture
def logged(tmp_path, monkeypatch):
    """A project with a model and a selector; what is logged, by step."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    processor, model = build_processor(["total"], SIZE), config.VLMS["micro"].path
    build_model(processor, SIZE, WIDTH, layers=1).save_pretrained(model)
    processor.save_pretrained(model)
    for folder in (SELECTOR, DISTILLED):
        FeatureSelector(WIDTH, GRID, layers=1, heads=1, layer=-1).save_pretrained(folder)
    params = OmegaConf.load(ROOT / "params.yaml")
    params.trainer.update({"accelerator": "cpu", "precision": "32-true"})
    params.latency.update({"kept": [0.25, 0.5], "batches": [1, 2], "seconds": 0.001})
    params.evaluate.reducers = ["full", "none", "random", "fastv", "pyramiddrop"]
    OmegaConf.save(params, "params.yaml")
    steps = {}
    log = SimpleNamespace(
        metrics=lambda values, step: steps.update({step: steps.get(step, {}) | values}),
        artifact=lambda *_: None,
    )
    monkeypatch.setattr("atr.core.tracking.run", lambda *_, **__: nullcontext(log))
    return steps


def test_every_reducer_before_the_language_model_is_timed_next_to_the_prefill_it_saves(logged):
    latency.main(config.load("latency"))
    found = json.loads((LATENCY / "metrics.json").read_text())
    assert set(found) == {"device", "entries", "prefill", "parameters", "provenance", "resolved"}
    assert found["resolved"]["vlm"]["digest"] and found["resolved"]["device"] == "cpu"
    assert "CPU" in found["device"] and found["device"].endswith("32-true")
    assert [(each["batch"], each["reducer"], each["tokens"], each["kept"]) for each in found["entries"]] == [
        (batch, name, TOKENS, kept)
        for batch in (1, 2)
        for name in ("random", "selector", "distilled")
        for kept in (4, 8)
    ]
    assert [(each["batch"], each["tokens"]) for each in found["prefill"]] == [
        (batch, tokens) for batch in (1, 2) for tokens in (4, 8, TOKENS)
    ]
    assert all(each["milliseconds"] > 0 for each in found["entries"] + found["prefill"])
    assert found["parameters"] == config.load("latency").raw() and found["provenance"]["versions"]
    assert {step: len(values) for step, values in logged.items()} == {4: 8, 8: 8, TOKENS: 2}
    assert logged[4]["random/batch 1/milliseconds"] == found["entries"][0]["milliseconds"]


def test_a_selector_of_other_features_is_refused_before_anything_is_timed(logged, monkeypatch):
    monkeypatch.setattr("atr.core.timing.Timer", None)
    FeatureSelector(WIDTH, GRID, layers=1, heads=1, layer=-2).save_pretrained(SELECTOR)
    with pytest.raises(ValueError, match=r"^the selector was trained on layer -2 .* reads layer -1"):
        latency.main(config.load("latency"))
    assert not LATENCY.exists()
