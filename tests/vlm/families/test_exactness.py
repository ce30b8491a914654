import warnings

import pytest

from atr.vlm.families import exactness
from atr.vlm.families.exactness import why_not_exact
from atr.vlm.families.proof import HalfByFeature
from atr.vlm.families.tiny import tiny_config, tiny_inputs, tiny_model
from atr.vlm.reduce import reduce


@pytest.fixture(autouse=True)
def unsaid(monkeypatch):
    monkeypatch.setattr(exactness, "_SAID", set())


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("qwen3_5", "1 of its 2 layers are linear_attention"),
        ("minicpmv4_6", "1 of its 2 layers are linear_attention"),
        ("lfm2_vl", "1 of its 2 layers are conv"),
        ("llava", ""),
        ("qwen3_vl_moe", ""),
        ("kimi_k25", ""),
    ],
)
def test_layers_that_mix_neighbours_are_found_from_the_config(model_type, reason):
    model = tiny_model(tiny_config(model_type))
    found = why_not_exact(model, 10)
    assert found.startswith(reason) and bool(found) == bool(reason)


@pytest.mark.parametrize("model_type", ["gemma3", "gemma4", "mistral3"])
def test_a_window_matters_only_where_it_is_shorter_than_the_prompt(model_type):
    model = tiny_model(tiny_config(model_type, sliding_window=8))
    assert why_not_exact(model, 8) == ""
    assert "sliding_window of 8 is shorter than the prompt of 9 tokens" in why_not_exact(model, 9)


def test_a_window_that_no_layer_has_does_not_matter():
    model = tiny_model(tiny_config("gemma3", sliding_window=8, layer_types=["full_attention"] * 2))
    assert why_not_exact(model, 9) == ""


def test_it_is_said_once_and_only_where_something_is_dropped():
    model = tiny_model(tiny_config("lfm2_vl"))
    inputs = tiny_inputs(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reduce(model, inputs, HalfByFeature(), 1.0)
    with pytest.warns(
        UserWarning, match="lfm2_vl: removing tokens is not the same as masking them, because 1"
    ):
        reduce(model, inputs, HalfByFeature(), 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reduce(model, inputs, HalfByFeature(), 0.5)
