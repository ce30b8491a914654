"""The equality checks of every family: a part of them in every run, all of them in the slow ones."""

import math
import warnings

import pytest
import torch

from atr.vlm.families import family_named, family_of, supported_types
from atr.vlm.families.checked import on_trial
from atr.vlm.families.proof import (
    CASES,
    CLOSE,
    EXACT,
    MASKED,
    HalfByFeature,
    all_kept_forward,
    half_dropped_masked,
    prove,
    rows_alone,
    run_check,
)
from atr.vlm.families.table import TABLE
from atr.vlm.families.tiny import TINY_TYPES, attention_kinds, tiny_config, tiny_inputs, tiny_model
from atr.vlm.families.tiny_inputs import ROWS
from atr.vlm.image_tokens import ImageTokens
from atr.vlm.reduce import reduce

BIDIRECTIONAL = "gemma4, vision bidirectional"
INEXACT = {"lfm2_vl", "minicpmv4_6", "qwen3_5", "qwen3_5_moe"}
TYPES = pytest.mark.parametrize("model_type", [*TINY_TYPES, BIDIRECTIONAL])


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "model type .*: removing tokens")
        yield


def config_of(model_type):
    if model_type == BIDIRECTIONAL:
        return tiny_config("gemma4", use_bidirectional_attention="vision")
    return tiny_config(model_type)


def test_every_supported_type_is_proven():
    assert set(TINY_TYPES) == set(supported_types()) >= set(TABLE)


@TYPES
def test_all_kept_is_the_untouched_model_and_half_dropped_is_half_masked(model_type):
    model = tiny_model(config_of(model_type))
    assert all_kept_forward(model, ROWS) == 0.0
    result = run_check(model, MASKED, half_dropped_masked, "ragged", ROWS, "eager", torch.float32, 1e-5)
    if model_type in INEXACT:
        assert "mix neighbouring tokens" in result.note
        assert 1e-2 < result.difference < math.inf
    else:
        assert not result.note
        assert result.ok


@pytest.mark.parametrize("model_type", ["qwen3_vl", "gemma3", "smolvlm", "ernie4_5_vl_moe", "paligemma"])
@torch.no_grad()
def test_right_padding_comes_back_as_left_padding(model_type):
    model = tiny_model(tiny_config(model_type))
    left, right = (
        reduce(model, tiny_inputs(model, padding=side), HalfByFeature(), 0.5) for side in ("left", "right")
    )
    assert set(left) == set(right)
    real_BL = left["attention_mask"].bool()
    for key in set(left) - {"mm_encoder_outputs", "use_cache"}:
        assert torch.equal(left[key][..., real_BL], right[key][..., real_BL]), key
    assert torch.equal(model(**left).logits[real_BL], model(**right).logits[real_BL])


@pytest.mark.exhaustive
@TYPES
def test_the_whole_matrix(model_type):
    config = config_of(model_type)
    results = list(prove(config))
    assert len(results) == len(attention_kinds(config)) * len(CASES) * (2 * len(EXACT) + len(CLOSE))
    assert [result for result in results if not result.ok] == []
    assert not [result for result in results if result.note.startswith("refused")]


@pytest.mark.parametrize("model_type", ["qwen3_vl", "gemma3"])
@pytest.mark.parametrize("check", CLOSE)
def test_every_check_holds_for_a_list_and_for_a_tensor_family(model_type, check):
    model = tiny_model(tiny_config(model_type))
    assert CLOSE[check](model, ROWS) < 3e-5


@pytest.mark.parametrize("check", [*EXACT, *CLOSE])
def test_every_check_finds_features_of_another_token(check, monkeypatch):
    """Each is broken in the same way: every image gets the tokens in reverse order."""

    def reversed_keep(self, kept, own=ImageTokens.keep):
        images = [tokens_PD.flip(0) for tokens_PD in self.images]
        return own(ImageTokens(images, self.levels, self.carried), kept)

    model = tiny_model(tiny_config("llava"))
    monkeypatch.setattr(ImageTokens, "keep", reversed_keep)
    caught = {**EXACT, **CLOSE}[check](model, ROWS)
    # A loop, a batch and beams of the same wrong features agree: they check what follows the features.
    follows_features = check.startswith(("greedy", "batch", "beams", "sampling"))
    assert (caught < 3e-5) == follows_features


def test_a_batch_with_the_images_of_other_rows_is_found(monkeypatch):
    def rotated_keep(self, kept, own=ImageTokens.keep):
        order = [*range(1, len(self.images)), 0]
        return own(ImageTokens([self.images[image] for image in order]), kept)

    model = tiny_model(tiny_config("llava"))
    monkeypatch.setattr(ImageTokens, "keep", rotated_keep)
    assert rows_alone(model, ((0,), (3,))) > 1e-3


def test_dropping_what_does_not_matter_proves_nothing():
    model = tiny_model(tiny_config("llava"))
    with torch.no_grad():
        model.model.multi_modal_projector.linear_2.weight.zero_()
        model.model.multi_modal_projector.linear_2.bias.zero_()
        model.model.language_model.layers.apply(
            lambda module: module.v_proj.weight.zero_() if hasattr(module, "v_proj") else None
        )
    with pytest.raises(ValueError, match="make no difference"):
        half_dropped_masked(model, ((0,),))


def test_a_check_that_raises_is_a_failure_with_its_reason():
    def broken(model, rows):
        raise RuntimeError("two\nlines")

    result = run_check(None, "check", broken, "case", ROWS, "eager", torch.float32, 1.0)
    assert not result.ok
    assert result.note == "RuntimeError: two lines"


def test_a_type_outside_the_table_is_admitted_on_trial_only():
    config = tiny_config("qianfan_ocr")
    model = tiny_model(config)
    with pytest.raises(ValueError, match="is not supported, allowed: llava"):
        family_of(model)
    with on_trial(config.model_type):
        assert all_kept_forward(model, ((0,),)) == 0.0
    family_named.cache_clear()


@pytest.mark.parametrize("model_type", ["exaone4_5", "hyperclovax_vision_v2"])
def test_original_positions_are_refused_where_generate_drops_them(model_type):
    model = tiny_model(tiny_config(model_type))
    with pytest.raises(ValueError, match=f"original is not supported by {model_type}, whose generate"):
        reduce(model, tiny_inputs(model), HalfByFeature(), 0.5)
    assert reduce(model, tiny_inputs(model), HalfByFeature(), 0.5, "contiguous").kept


def test_a_model_without_the_hook_is_refused_by_name():
    model = tiny_model(tiny_config("llava"))
    model.config.model_type = "qwen2_vl"

    class Unhooked(type(model)):
        def forward(self, input_ids=None, **kwargs):
            return super().forward(input_ids, **kwargs)

    model.__class__ = Unhooked
    with pytest.raises(ValueError, match="'qwen2_vl' is not supported: its forward does not name mm_encoder"):
        reduce(model, tiny_inputs(tiny_model(tiny_config("llava"))), HalfByFeature(), 0.5)
