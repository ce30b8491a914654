"""Shared prefixes and weighted passes of every causal family of the rule, on tiny copies."""

from functools import partial

import pytest
import torch

from atr.reduction.peers.random import Random
from atr.vlm import weighted_attention
from atr.vlm.decoding import decode_greedily
from atr.vlm.families.tiny import TINY_TYPES, tiny_config, tiny_inputs, tiny_model
from atr.vlm.policy import Policy
from atr.vlm.prefix import ALL_BRANCHES, PrefixCache, split_prompts, why_not_shared
from atr.vlm.reduce import prepare, shorten
from atr.vlm.sequence import TOKEN_TYPES, position_ids
from atr.vlm.weighted_attention import WeightedSequence, log_probabilities

# Several axes of positions, further features in the first layers, experts by token types, one tensor.
USUAL = ("qwen2_5_vl", "qwen3_vl_moe", "ernie4_5_vl_moe", "internvl")
WHY_NOT = {
    "qwen3_5": "the cache of qwen3_5_text has layers of type LinearAttentionLayer",
    "qwen3_5_moe": "the cache of qwen3_5_moe_text has layers of type LinearAttentionLayer",
    "minicpmv4_6": "the cache of qwen3_5_text has layers of type LinearAttentionLayer",
    "lfm2_vl": "the cache of lfm2 has layers of type LinearAttentionLayer",
    "gemma3": "the cache of gemma3_text has layers of type DynamicSlidingWindowLayer",
    "gemma4": "the cache of gemma4_text has layers of type DynamicSlidingWindowLayer",
    "aya_vision": "the cache of cohere2 has layers of type DynamicSlidingWindowLayer",
    "cohere2_vision": "the cache of cohere2 has layers of type DynamicSlidingWindowLayer",
    "exaone4_5": "the cache of exaone4 has layers of type DynamicSlidingWindowLayer",
    "ovis2": "ovis2 embeds tokens of the text by visual_indicator_features",
    "paligemma": "paligemma lets the tokens of a prefix see later ones, its attention is not causal",
}
SHARED = [name for name in TINY_TYPES if name not in WHY_NOT]
CASES = [name if name in USUAL else pytest.param(name, marks=pytest.mark.exhaustive) for name in SHARED]
ROWS = [(0, 1), (0, 1), (2, 1), (0, 1)]
SHOWN = [image for row in ROWS for image in row]


@pytest.fixture(params=CASES)
def model(request):
    return tiny_model(tiny_config(request.param)).requires_grad_(False)


def drop_ends(inputs, counts):
    """The rows of an input without their last tokens, as many as `counts`, padded on the left."""
    rows = {}
    for key in ("input_ids", "attention_mask", *TOKEN_TYPES):
        if key in inputs:
            rows[key] = torch.stack(
                [
                    torch.cat([row.new_zeros(count), row[: len(row) - count]])
                    for row, count in zip(inputs[key], counts, strict=True)
                ]
            )
    return {**inputs, **rows}


def positions_of(model):
    return "original" if "hyperclovax" not in model.config.model_type else "contiguous"


@pytest.fixture
def reduced(model):
    """Four prompts of other lengths about two images each, reduced to half; three about the same ones."""
    inputs = tiny_inputs(model, ROWS)
    inputs["input_ids"][:, -3:] = torch.arange(12).reshape(4, 3) + 10
    inputs = drop_ends(inputs, [0, 1, 0, 2])
    return prepare(model, inputs).reduce(Random(0), Policy(0.5, positions_of(model)))


@torch.inference_mode()
def test_branches_of_a_prefix_have_the_logits_of_separate_prompts(model, reduced):
    if hasattr(model.base_model, "rope_deltas"):
        model.base_model.rope_deltas = torch.full((4, 1), 1000)  # of another batch
    split = split_prompts(model, reduced, SHOWN)
    assert split.prefix_B.tolist() == [0, 0, 1, 0] and split.branch_B.tolist() == [0, 1, 0, 2]
    cache, _ = PrefixCache.prefill(model, split.prefixes)
    logits = cache.extend(split.pack(), keep=3)[split.prefix_B, split.branch_B]
    expected = model(**{"use_cache": True, **reduced}, logits_to_keep=1).logits[:, -1]
    assert torch.allclose(logits, expected, atol=1e-5)
    assert (expected[0] - expected[1]).abs().max() > 0.01


@torch.inference_mode()
def test_answers_from_shared_prefixes_are_those_of_separate_prompts(model, reduced):
    split, length = split_prompts(model, reduced, SHOWN), reduced["input_ids"].shape[1]
    options = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0}
    expected = model.generate(**reduced, **options)[:, length:].tolist()
    for part in (split, None):
        answers = model.generate(
            **reduced, **options, custom_generate=partial(decode_greedily, split=part), eos_token_id=None
        )
        assert [ids[length:] for ids in answers] == expected


@torch.inference_mode()
@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_weights_of_1_and_0_are_the_models_own_pass_over_what_is_kept(model, keep, monkeypatch):
    monkeypatch.setattr(weighted_attention, "DROPPED_WEIGHT", 1e-12)
    inputs = tiny_inputs(model, [(0,), (3,)])
    prepared = prepare(model, inputs)
    kept = [torch.arange(0, length, round(1 / keep)) for length in prepared.layout.lengths]
    shorter = shorten(model, inputs, prepared.tokens, kept, positions_of(model))
    expected = model(**shorter).logits[:, -2:].log_softmax(-1).flatten(0, 1)
    sequences, positions = [], position_ids(model, inputs)
    for row, kept_K in enumerate(kept):
        real_L = inputs["attention_mask"][row].bool()
        ids_T, image = inputs["input_ids"][row][real_L], prepared.tokens.of([row])
        visual_T = ids_T == model.config.image_token_id
        weight_P = torch.zeros(int(visual_T.sum())).index_fill_(0, kept_K, 1.0)
        weight_T = torch.ones(len(ids_T)).masked_scatter(visual_T, weight_P)
        own_T = positions[..., row, real_L]
        sequences.append(
            WeightedSequence(
                ids_T,
                own_T if positions_of(model) == "original" else (weight_T.cumsum(0) - 1).clamp(min=0).long(),
                torch.full_like(ids_T, ALL_BRANCHES),
                weight_T,
                image.images[0],
                torch.arange(len(ids_T) - 2, len(ids_T)),
                [level[0] for level in image.levels],
                image.carried,
                {name: inputs[name][row][real_L] for name in TOKEN_TYPES if name in inputs},
            )
        )
    torch.testing.assert_close(log_probabilities(model, sequences), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [*CASES, *WHY_NOT])
def test_what_cannot_be_shared_is_known_by_the_configuration(name):
    with torch.device("meta"):
        model = tiny_model(tiny_config(name))
    assert why_not_shared(model) == WHY_NOT.get(name, "")


def test_gemma_4_shares_where_its_images_are_read_causally():
    """As its small checkpoints are; the larger ones let the tokens of an image see each other."""
    for mode, reason in ((None, ""), ("vision", "gemma4 lets the tokens of a prefix see later ones")):
        full = {"layer_types": ["full_attention"] * 2, "use_bidirectional_attention": mode}
        with torch.device("meta"):
            model = tiny_model(tiny_config("gemma4", **full))
        assert why_not_shared(model).startswith(reason) and bool(why_not_shared(model)) == bool(reason)
