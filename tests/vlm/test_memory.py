"""What `reduce` costs beside the model: memory and passes of the tower, by the script that prints them."""

from importlib import import_module
from pathlib import Path

import pytest

from atr.reduction.registry import build_reducer

ROOT = Path(__file__).parents[2]


@pytest.fixture
def memory(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    return import_module("benchmarks.memory")


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_next"])
def test_a_quarter_of_a_long_input_needs_no_more_memory_than_all_of_it(family, memory):
    model, inputs = memory.MODELS[family](width=64, layers=2)
    assert (inputs["input_ids"] == model.config.image_token_id).sum() > 2900
    peaks = memory.compare(model, inputs, memory.make_selector(model), 0.25)
    assert peaks.passes == 1
    assert 0 < peaks.ratio <= 1.05


def test_attention_of_all_patches_is_never_held_at_once(memory):
    model, inputs = memory.make_qwen(width=64, layers=2)
    patches = len(inputs["pixel_values"])
    peaks = memory.compare(model, inputs, build_reducer("class_attention"), 0.25)
    assert peaks.passes == 1
    assert peaks.reduced - peaks.untouched < 4 * patches**2 / 10, "a tenth of the matrix of one head"
