import warnings
from dataclasses import replace
from inspect import signature

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import BloomConfig

from atr.config import Evaluate
from atr.core.layout import LAYOUT
from atr.core.tokens import budget, top_k_BK
from atr.integrations.lmms_eval.arguments import Arguments
from atr.reduction import FeatureSelector, Full, SelectorReducer
from atr.reduction.peers.random import Random
from atr.vlm import policy
from atr.vlm.image_tokens import ImageTokens
from atr.vlm.in_llm import prune_layers
from atr.vlm.policy import Policy
from atr.vlm.reduce import prepare, reduce, shorten

TOKENS = 16
SINGLE = ("<image> a b",)
RAGGED = ("<image> a b", "c <image> d e f g <image> h", "i j k", "<image> <image> l")
FAMILIES = pytest.mark.parametrize("family", ["llava", "llava_next", "llava_onevision"])
SUPPRESSED = [2, 4]  # the end, and a placeholder that a random model may well choose
BATCHES = pytest.mark.parametrize("prompts", [SINGLE, RAGGED], ids=["single", "ragged"])
POSITIONS = pytest.mark.parametrize("positions", ["contiguous", "original"])
ATTENTION = pytest.mark.parametrize("attention", ["eager", "sdpa"])


class Spread:
    """Keeps tokens at even distances, whatever they hold."""

    needs = frozenset()

    def __call__(self, encoded, budget):
        kept = torch.linspace(0, encoded.tokens - 1, budget).round().long()
        return kept.repeat(len(encoded.features_BND), 1)


def sizes_of(model, inputs):
    """Visual tokens of each image as the untouched model makes them."""
    images = {key: value for key, value in inputs.items() if key not in ("input_ids", "attention_mask")}
    return [len(features) for features in model.model.get_image_features(**images).pooler_output]


def full_mask(model, inputs, kept_of_images):
    """The full sequence's mask with the dropped placeholders hidden, written out image by image."""
    mask = inputs["attention_mask"].clone()
    placeholders = iter((inputs["input_ids"] == model.config.image_token_id).nonzero().tolist())
    for size, kept in zip(sizes_of(model, inputs), kept_of_images, strict=True):
        for token in range(size):
            row, column = next(placeholders)
            mask[row, column] = token in kept
    assert next(placeholders, None) is None
    return mask


def indices(shorter):
    return [kept.indices_K.tolist() for kept in shorter.kept]


def original_positions(inputs):
    return (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)


def greedy(model, inputs, steps):
    """Greedy decoding of one row by hand: a full forward pass for each token, nothing suppressed chosen."""
    inputs, chosen = dict(inputs), []
    for _ in range(steps):
        logits = model(**inputs).logits[0, -1]
        logits[SUPPRESSED] = -torch.inf
        chosen.append(int(logits.argmax()))
        inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([chosen[-1:]])], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        if "position_ids" in inputs:
            inputs["position_ids"] = torch.cat(
                [inputs["position_ids"], inputs["position_ids"][:, -1:] + 1], 1
            )
    return chosen


@FAMILIES
@POSITIONS
@BATCHES
@ATTENTION
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_keeping_every_token_is_the_untouched_model_bit_for_bit(
    make_model, process, prompts, attention, dtype, positions
):
    model, inputs = make_model(attention, dtype), process(*prompts)
    untouched = model(**inputs).logits, model.generate(**inputs, max_new_tokens=4, do_sample=False)
    logits = model(**reduce(model, inputs, Full(), 1.0, positions)).logits
    answers = model.generate(
        **reduce(model, inputs, Random(), 1.0, positions), max_new_tokens=4, do_sample=False
    )
    assert torch.equal(logits, untouched[0])
    assert torch.equal(answers, untouched[1])


@FAMILIES
@BATCHES
@ATTENTION
@pytest.mark.parametrize("keep, newline", [(1, "keep"), (0.3, "follow"), (0.5, "keep"), (15, "follow")])
@torch.no_grad()
def test_dropped_tokens_are_as_if_masked_out(make_model, process, prompts, attention, keep, newline):
    model, inputs = make_model(attention), process(*prompts)
    shorter = reduce(model, inputs, Random(3), keep, "original", newline=newline)
    mask = full_mask(model, inputs, indices(shorter))
    masked = model(**{**inputs, "attention_mask": mask}, position_ids=original_positions(inputs))
    ours = model(**shorter).logits[shorter["attention_mask"].bool()]
    torch.testing.assert_close(ours, masked.logits[mask.bool()], atol=1e-5, rtol=1e-5)


@FAMILIES
@torch.no_grad()
def test_bfloat16_differs_from_float32_by_its_rounding_alone(make_model, process):
    inputs = process(*RAGGED)
    exact, rounded = (
        model(**reduce(model, inputs, Spread(), 0.5, "original")).logits.float()
        for model in (make_model(dtype=torch.float32), make_model(dtype=torch.bfloat16))
    )
    assert 0 < (exact - rounded).abs().mean() < 0.05 * exact.std()


@FAMILIES
@BATCHES
@ATTENTION
@torch.no_grad()
def test_dropped_tokens_are_as_if_masked_out_in_bfloat16_too(make_model, process, prompts, attention):
    """Up to its rounding, of which a kernel has another for another length."""
    model, inputs = make_model(attention, dtype=torch.bfloat16), process(*prompts)
    shorter = reduce(model, inputs, Random(3), 0.5, "original")
    mask = full_mask(model, inputs, indices(shorter))
    masked = model(**{**inputs, "attention_mask": mask}, position_ids=original_positions(inputs))
    ours, theirs = model(**shorter).logits[shorter["attention_mask"].bool()], masked.logits[mask.bool()]
    assert (ours.float() - theirs.float()).abs().mean() < 0.01 * theirs.float().std()


@FAMILIES
@POSITIONS
@BATCHES
@ATTENTION
@torch.no_grad()
def test_generate_is_greedy_decoding_by_hand_of_each_row_alone(
    make_model, process, prompts, positions, attention
):
    model = make_model(attention)
    shorter = reduce(model, process(*prompts), Spread(), 0.4, positions)
    start = shorter["input_ids"].shape[1]
    generated = model.generate(**shorter, max_new_tokens=5, suppress_tokens=SUPPRESSED, do_sample=False)[
        :, start:
    ]
    alone = [reduce(model, process(prompt), Spread(), 0.4, positions) for prompt in prompts]
    assert generated.tolist() == [greedy(model, inputs, 5) for inputs in alone]


@FAMILIES
@POSITIONS
@ATTENTION
@torch.no_grad()
def test_generate_is_greedy_decoding_by_hand_in_bfloat16_too(make_model, process, positions, attention):
    """Of one row: rows of a batch differ from rows alone by rounding."""
    model = make_model(attention, dtype=torch.bfloat16)
    shorter = reduce(model, process(*SINGLE), Spread(), 0.4, positions)
    generated = model.generate(**shorter, max_new_tokens=5, suppress_tokens=SUPPRESSED, do_sample=False)
    assert generated[:, shorter["input_ids"].shape[1] :].tolist() == [greedy(model, shorter, 5)]


@FAMILIES
@torch.no_grad()
def test_generated_tokens_follow_the_original_positions(model, process):
    """The full sequence with the dropped tokens masked decides each generated token too."""
    inputs = process(*SINGLE)
    shorter = reduce(model, inputs, Spread(), 0.4, "original")
    generated = model.generate(**shorter, max_new_tokens=4, suppress_tokens=SUPPRESSED, do_sample=False)[
        0, -4:
    ]
    full = dict(inputs, attention_mask=full_mask(model, inputs, indices(shorter)))
    for token in generated:
        logits = model(**full, position_ids=torch.arange(full["input_ids"].shape[1])[None]).logits[0, -1]
        logits[SUPPRESSED] = -torch.inf
        assert token == logits.argmax()
        full["input_ids"] = torch.cat([full["input_ids"], token.view(1, 1)], 1)
        full["attention_mask"] = torch.cat([full["attention_mask"], torch.ones(1, 1, dtype=torch.int64)], 1)


@torch.no_grad()
def test_positions_are_original_or_renumbered(model, process):
    inputs = process(*SINGLE)
    contiguous, original = (reduce(model, inputs, Spread(), 3, p) for p in ("contiguous", "original"))
    assert "position_ids" not in contiguous
    # <s>, tokens 0, 8 (7.5 to even) and 15 of the image, a, b
    assert original["position_ids"].tolist() == [[0, 1, 9, 16, 17, 18]]
    assert not torch.allclose(model(**contiguous).logits, model(**original).logits, atol=1e-3)


@BATCHES
@torch.no_grad()
def test_exactly_the_budget_stays_and_all_text(model, process, prompts):
    inputs = process(*prompts)
    with pytest.raises(ValueError, match="keep: 0 leaves no visual token"):
        reduce(model, inputs, Random(0), 0)
    for keep in range(1, TOKENS + 1):
        shorter = reduce(model, inputs, Random(0), keep)
        for before, after, mask in zip(
            inputs["input_ids"], shorter["input_ids"], shorter["attention_mask"], strict=True
        ):
            images = int((before == 4).sum()) // TOKENS
            assert (after[mask.bool()] == 4).sum() == keep * images
            assert after[(after > 4)].tolist() == before[before > 4].tolist()


@FAMILIES
@torch.no_grad()
def test_right_padding_comes_back_as_left_padding(model, process):
    left = reduce(model, process(*RAGGED), Spread(), 0.5, "original")
    right = reduce(model, process(*RAGGED, padding_side="right"), Spread(), 0.5, "original")
    assert torch.equal(model(**left).logits, model(**right).logits)


@torch.no_grad()
def test_budgets_may_differ_between_the_images_of_a_batch(model, process):
    inputs = process(*RAGGED)
    packed = prepare(model, inputs).tokens
    keep = [torch.arange(count) for count in (2, 16, 1, 7, 3)]
    together = shorten(model, inputs, packed, keep, "original")
    assert together["attention_mask"].sum(1).tolist() == [1 + 2 + 2, 1 + 17 + 6, 4, 1 + 10 + 1]
    alone = shorten(model, process(RAGGED[3]), packed.of([3, 4]), keep[3:], "original")
    torch.testing.assert_close(
        model(**together).logits[3, -12:], model(**alone).logits[0], atol=1e-5, rtol=1e-5
    )


@FAMILIES
@POSITIONS
@BATCHES
@ATTENTION
@torch.no_grad()
def test_beams_sampling_and_a_static_cache_run_on_the_shorter_input(
    make_model, process, prompts, positions, attention
):
    model, inputs = make_model(attention), process(*prompts)

    def generate(**options):
        shorter = reduce(model, inputs, Spread(), 0.4, positions)
        start = shorter["input_ids"].shape[1]
        options = {"do_sample": False, "max_new_tokens": 4, "suppress_tokens": SUPPRESSED} | options
        return model.generate(**shorter, **options)[:, start:]

    assert torch.equal(generate(cache_implementation="static", disable_compile=True), generate())
    assert generate(num_beams=3).shape == generate(do_sample=True).shape == (len(prompts), 4)


@FAMILIES
def test_gradients_reach_the_projector_and_the_tower(model, process):
    model(**reduce(model, process(*RAGGED), Spread(), 0.5, "original")).logits.sum().backward()
    for part in (
        model.model.multi_modal_projector.linear_1,
        model.model.vision_tower.embeddings.patch_embedding,
    ):
        assert part.weight.grad.abs().sum() > 0


@FAMILIES
@torch.no_grad()
def test_the_model_and_its_inputs_stay_untouched(model, process):
    inputs = process(*RAGGED)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    before = {name: value.clone() for name, value in inputs.items()}
    attributes = type(model), set(vars(model)), set(vars(model.model)), model.config.to_dict()
    model.generate(**reduce(model, inputs, Random(0), 0.3, "original"), max_new_tokens=2)
    assert (type(model), set(vars(model)), set(vars(model.model)), model.config.to_dict()) == attributes
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(value, before[name]) for name, value in inputs.items())


@pytest.fixture
def selector():
    """Of random weights, so that some tokens of each image have a positive logit and others not."""
    torch.manual_seed(1)
    selector = FeatureSelector(width=24, grid=(4, 4), layers=1, heads=2, initial_bias=0.0).eval()
    torch.nn.init.normal_(selector.trunk.head.weight)
    return selector


@FAMILIES
@torch.no_grad()
def test_a_trained_selector_is_taken_as_it_is(model, process, selector):
    inputs = process(*RAGGED)
    taken = reduce(model, inputs, selector, 0.4)
    wrapped = reduce(model, inputs, SelectorReducer(selector), 0.4)
    assert torch.equal(model(**taken).logits, model(**wrapped).logits)


@FAMILIES
@torch.no_grad()
def test_text_alone_passes_unchanged(model, process):
    inputs = process("a b", "c d e")
    assert torch.equal(model(**reduce(model, inputs, Full(), 0.1)).logits, model(**inputs).logits)


@torch.no_grad()
def test_original_positions_cannot_meet_a_generate_without_cache(model, process):
    """Without mask and cache the gaps would split the sequence silently: it must fail, or be right."""
    shorter = reduce(model, process(*SINGLE), Spread(), 0.4, "original")
    with pytest.raises(TypeError, match="use_cache"):
        model.generate(**shorter, use_cache=False, max_new_tokens=3)
    greedily = {"max_new_tokens": 4, "suppress_tokens": SUPPRESSED, "do_sample": False}
    contiguous = reduce(model, process(*SINGLE), Spread(), 0.4, "contiguous")
    cached, uncached = (
        model.generate(**contiguous, use_cache=use_cache, **greedily) for use_cache in (True, False)
    )
    assert torch.equal(cached, uncached)


@FAMILIES
@POSITIONS
@torch.no_grad()
def test_what_is_kept_is_reported_image_by_image(model, process, family, positions):
    inputs = process(*RAGGED)
    for keep in (0.2, 7, 1.0):
        for newline in ("keep", "follow"):
            shorter = reduce(model, inputs, Random(0), keep, positions, newline=newline)
            placeholders = (shorter["input_ids"] == 4).sum(1).tolist()
            per_image = [kept.tokens + kept.newlines for kept in shorter.kept]
            assert placeholders == [per_image[0], sum(per_image[1:3]), 0, sum(per_image[3:])]
            features = shorter["mm_encoder_outputs"]["image"].pooler_output
            assert [len(tokens) for tokens in features] == per_image
            for kept, size in zip(shorter.kept, sizes_of(model, inputs), strict=True):
                assert kept.tokens == budget(keep, kept.of)
                assert len(kept.indices_K) == kept.tokens + kept.newlines
                assert kept.newlines <= size - kept.of
                assert newline == "follow" or kept.newlines == size - kept.of
                assert (kept.of < size) == (family != "llava")


@FAMILIES
@torch.no_grad()
def test_one_result_serves_many_calls(model, process):
    shorter = reduce(model, process(*RAGGED), Spread(), 0.4, "original")
    options = {"max_new_tokens": 3, "suppress_tokens": SUPPRESSED, "do_sample": False}
    first = model.generate(**shorter, **options, num_beams=3)
    assert torch.equal(model.generate(**shorter, **options, num_beams=3), first)
    assert torch.equal(model(**shorter).logits, model(**dict(shorter)).logits)
    assert {"input_ids", "attention_mask", "mm_encoder_outputs"} <= set(shorter)
    assert len(shorter) == len(dict(shorter))


@FAMILIES
@torch.no_grad()
def test_one_encoding_serves_many_budgets(model, process):
    inputs = process(*RAGGED)
    prepared = prepare(model, inputs)
    for keep, budget_of in ((0.3, "image"), (0.6, "tile"), (5, "image")):
        once = prepared.reduce(Random(1), Policy(keep, budget=budget_of))
        again = reduce(model, inputs, Random(1), keep, budget=budget_of)
        assert torch.equal(model(**once).logits, model(**again).logits)


@pytest.mark.parametrize("family", ["llava_onevision"])
@pytest.mark.parametrize("padding_side", ["left", "right"])
@torch.no_grad()
def test_without_interpolation_all_tokens_are_those_of_a_model_that_has_none(
    make_model, process, processor, padding_side
):
    model, other = make_model(), make_model(vision_aspect_ratio="anyres_max_1000")
    inputs = process(*RAGGED)
    processor.vision_aspect_ratio = "anyres_max_1000"
    wide = process(*RAGGED)
    assert wide["input_ids"].shape[1] > inputs["input_ids"].shape[1]
    inputs = inputs if padding_side == "left" else process_right(process, processor)
    untouched = other(**wide).logits
    for positions in ("contiguous", "original"):
        shorter = reduce(model, inputs, Full(), 1.0, positions, interpolation="off")
        assert torch.equal(model(**shorter).logits, untouched)
    dropped = reduce(model, inputs, Random(0), 0.3, "original", interpolation="off")
    expected = reduce(other, wide, Random(0), 0.3, "original")
    assert indices(dropped) == indices(expected)
    assert torch.equal(model(**dropped).logits, other(**expected).logits)


def process_right(process, processor):
    """The prompts padded on the right, by a processor that shrinks as the model does."""
    processor.vision_aspect_ratio = "anyres_max_2"
    return process(*RAGGED, padding_side="right")


@pytest.mark.parametrize("family", ["llava", "llava_next"])
@torch.no_grad()
def test_where_nothing_is_resampled_there_is_nothing_to_switch_off(model, process):
    inputs = process(*RAGGED)
    off, on = (reduce(model, inputs, Spread(), 0.4, interpolation=choice) for choice in ("off", "model"))
    assert torch.equal(model(**off).logits, model(**on).logits)


@FAMILIES
@pytest.mark.parametrize("interpolation", ["model", "off"])
@torch.no_grad()
def test_images_of_extreme_shapes_have_the_right_counts(model, process, interpolation):
    pictures = [[Image.new("RGB", size, "red")] for size in ((1, 1), (10_000, 20), (20, 10_000))]
    inputs = process("<image> a", "<image> b c", "<image> d", images=pictures)
    untouched = model(**inputs).logits
    whole = reduce(model, inputs, Full(), 1.0, interpolation=interpolation)
    if interpolation == "model":
        assert torch.equal(model(**whole).logits, untouched)
    for budget_of in ("image", "tile"):
        for keep in (0.5, 3):
            shorter = reduce(model, inputs, Random(0), keep, "original", budget_of, "follow", interpolation)
            assert model(**shorter).logits.isfinite().all()
            assert [kept.tokens for kept in shorter.kept] == [budget(keep, kept.of) for kept in whole.kept]


@FAMILIES
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@torch.no_grad()
def test_counts_match_for_any_image_and_budget(model, process, selector, family, data):
    side = st.integers(1, 300) if family != "llava" else st.just(28)
    shapes = data.draw(st.lists(st.lists(st.tuples(side, side), max_size=2), min_size=1, max_size=3))
    reducer, keep = data.draw(
        st.tuples(st.sampled_from([Random(0), selector]), st.floats(1e-3, 1) | st.integers(1, 16))
        | st.just((selector, "adaptive"))
    )
    policy = {key: data.draw(st.sampled_from(values), key) for key, values in LAYOUT.items()}
    pictures = [[Image.new("RGB", size) for size in sizes] for sizes in shapes]
    inputs = process(*["<image> a " * len(sizes) + "b" for sizes in shapes], images=pictures)
    shorter = reduce(model, inputs, reducer, keep, **policy)
    if any(shapes) and keep != "adaptive":
        whole = reduce(model, inputs, Full(), 1.0, interpolation=policy["interpolation"])
        assert [kept.tokens for kept in shorter.kept] == [budget(keep, kept.of) for kept in whole.kept]
    assert model(**shorter).logits.shape[:2] == shorter["input_ids"].shape
    images = iter(shorter.kept)
    for ids, sizes in zip(shorter["input_ids"], shapes, strict=True):
        expected = sum(kept.tokens + kept.newlines for kept in (next(images) for _ in sizes))
        assert (ids == 4).sum() == expected


@FAMILIES
def test_a_placeholder_typed_in_a_text_is_no_image(model, process):
    inputs = process(*RAGGED)
    typed = {**inputs, "input_ids": inputs["input_ids"].clone()}
    typed["input_ids"][2, -1] = 4
    total = int((inputs["input_ids"] == 4).sum())
    with pytest.raises(ValueError, match=f"{total + 1} image placeholders for {total} tokens of 5 images"):
        reduce(model, typed, Random(), 0.5)
    with pytest.raises(ValueError, match="1 image placeholders for 0 tokens of 0 images"):
        reduce(model, {key: typed[key][2:3] for key in ("input_ids", "attention_mask")}, Random(), 0.5)


@FAMILIES
@pytest.mark.parametrize("prompt, images", [("a <image> b", 0), ("<image> a <image> b", 1)])
def test_a_typed_placeholder_is_refused_by_the_processor_or_else_by_us(model, process, prompt, images):
    with pytest.raises(ValueError, match="image"):
        reduce(model, process(prompt, images=[[Image.new("RGB", (28, 28))] * images]), Random(), 0.5)


def test_a_wrong_count_of_placeholders_shows_before_anything_is_encoded(model, process, monkeypatch):
    monkeypatch.setattr(type(model.model.vision_tower), "forward", None)
    inputs = process(*SINGLE)
    for change, message in (
        ({key: inputs[key][:, 2:] for key in ("input_ids", "attention_mask")}, "15 image placeholders"),
        ({"input_ids": inputs["input_ids"][:, 2:]}, r"attention_mask is \(1, 19\), input_ids is \(1, 17\)"),
        ({"labels": inputs["input_ids"]}, "labels cannot be shortened"),
    ):
        with pytest.raises(ValueError, match=message):
            reduce(model, {**inputs, **change}, Random(), 0.5)


@pytest.mark.parametrize("change", [{"layer": -1}, {"layer": 3}, {"width": 32}, {"grid": (2, 8)}])
def test_a_selector_of_other_features_is_refused_by_name(model, process, change):
    selector = FeatureSelector(
        **{"width": 24, "grid": (4, 4), "layers": 1, "heads": 2, "encoder": "another/tower", "layer": -2}
        | change
    )
    for reducer in (selector, SelectorReducer(selector)):
        with pytest.raises(ValueError, match=r"encoder another/tower.*llava reads layer -2, \[4, 4, 24\]"):
            reduce(model, process(*SINGLE), reducer, 0.5)


def test_what_cannot_be_shortened_is_refused_by_name(model, process):
    inputs = process(*RAGGED)
    with pytest.raises(ValueError, match=r"positions: 'gappy' is unknown, allowed: original, contiguous"):
        reduce(model, inputs, Full(), 1.0, "gappy")
    with pytest.raises(ValueError, match=r"keep: 1\.2 is out of range"):
        reduce(model, inputs, Full(), 1.2)
    with pytest.raises(ValueError, match="keep: 17 is out of range"):
        reduce(model, inputs, Random(), 17)
    with pytest.raises(ValueError, match="labels cannot be shortened"):
        reduce(model, {**inputs, "labels": inputs["input_ids"]}, Full(), 1.0)
    with pytest.raises(ValueError, match="attention_mask is missing"):
        reduce(model, {"input_ids": inputs["input_ids"], "pixel_values": inputs["pixel_values"]}, Full(), 1.0)
    with pytest.raises(ValueError, match="80 image placeholders for 64 tokens"):
        reduce(model, {**inputs, "pixel_values": inputs["pixel_values"][:4]}, Full(), 1.0)
    with pytest.raises(ValueError, match="80 image placeholders for 0 tokens"):
        reduce(model, {name: inputs[name] for name in ("input_ids", "attention_mask")}, Full(), 1.0)


def test_an_image_split_over_two_rows_is_refused(model, process):
    inputs = process(*SINGLE)
    ids = inputs["input_ids"].clone()
    split = {
        "input_ids": ids.view(1, -1).repeat(2, 1),
        "attention_mask": torch.ones(2, ids.shape[1], dtype=torch.int64),
    }
    split["input_ids"][0, 1:9] = 5
    split["input_ids"][1, 9:17] = 5
    with pytest.raises(ValueError, match="lie in two rows"):
        shorten(model, split, ImageTokens([torch.zeros(TOKENS, 32)]), [torch.arange(4)])


def test_original_positions_are_refused_under_flash_attention(model, process):
    model.config.get_text_config()._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="positions: original is not safe under flash_attention_2"):
        shorten(model, process("a b"), ImageTokens([]), [], "original")
    shorten(model, process("a b"), ImageTokens([]), [], "contiguous")


def test_original_positions_are_the_one_default(model, process):
    """Those that the pipeline evaluates under, wherever positions can be left out."""
    functions = (reduce, shorten, prune_layers, Policy, Arguments, Evaluate)
    assert (
        {signature(each).parameters["positions"].default for each in functions}
        == {policy.POSITIONS}
        == {"original"}
    )
    inputs = process(*SINGLE)
    left_out, original = reduce(model, inputs, Spread(), 3), reduce(model, inputs, Spread(), 3, "original")
    assert torch.equal(left_out["position_ids"], original["position_ids"])


def test_a_language_model_that_takes_no_positions_gets_no_original_ones(make_model, process):
    text = BloomConfig(vocab_size=31, hidden_size=32, n_layer=1, n_head=4, pad_token_id=0)
    model = make_model(text_config=text)
    with pytest.raises(ValueError, match="original is not supported by bloom, allowed: contiguous"):
        reduce(model, process(*SINGLE), Spread(), 3)
    model(**reduce(model, process(*SINGLE), Spread(), 3, "contiguous"))


def test_a_selector_used_at_other_positions_than_it_was_taught_says_so_once(model, process):
    selector = FeatureSelector(24, (4, 4), layers=1, heads=2, encoder="my/tower")
    with warnings.catch_warnings(record=True) as unknown:
        warnings.simplefilter("default")
        reduce(model, process(*SINGLE), selector, 3, "contiguous")
    selector.note(positions="original")
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("default")
        reduce(model, process(*SINGLE), selector, 3)
        for _ in range(3):
            reduce(model, process(*SINGLE), selector, 3, "contiguous")
            reduce(model, process(*SINGLE), SelectorReducer(selector), 0.5, "contiguous")
    assert unknown == []
    (warning,) = warned
    assert warning.category is UserWarning
    assert str(warning.message) == (
        "the selector of encoder my/tower was trained and evaluated with positions='original', it is used "
        "with positions='contiguous': answers can be much worse"
    )


def test_a_reducer_that_breaks_its_promise_is_caught(model, process):
    class Short(Spread):
        def __call__(self, encoded, budget):
            return super().__call__(encoded, budget)[:, 1:]

    class Twice(Spread):
        def __call__(self, encoded, budget):
            return torch.zeros(len(encoded.features_BND), budget, dtype=torch.int64)

    for reducer, message in (
        (Short(), r"Short: kept indices have shape \(1, 4\)"),
        (Twice(), "Twice: a token is kept twice"),
    ):
        with pytest.raises(ValueError, match=message):
            reduce(model, process(*SINGLE), reducer, 5)


class Halves:
    """Merges the first and the second half of an image's tokens, or as many equal parts as are asked for."""

    needs = frozenset()

    def __call__(self, encoded, budget):
        return self.merge(encoded, budget)[0]

    def merge(self, encoded, budget):
        parts = encoded.features_BND.tensor_split(budget, dim=1)
        first = torch.tensor([0, *(part.shape[1] for part in parts[:-1])]).cumsum(0)
        return first.repeat(len(encoded.features_BND), 1), torch.stack([part.mean(1) for part in parts], 1)


@pytest.mark.parametrize("family", ["llava"])
@BATCHES
@torch.no_grad()
def test_merged_tokens_are_projected_in_place_of_those_that_are_kept(model, process, prompts):
    inputs = process(*prompts)
    shorter = reduce(model, inputs, Halves(), 2)
    made = shorter["mm_encoder_outputs"]["image"].pooler_output
    features = prepare(model, inputs).encoded.whole.features_BND
    halves = torch.stack([features[:, :8].mean(1), features[:, 8:].mean(1)], 1)
    torch.testing.assert_close(torch.stack(made), model.model.multi_modal_projector(halves))
    assert indices(shorter) == [[0, 8]] * len(made)
    assert torch.equal(model(**reduce(model, inputs, Halves(), 1.0)).logits, model(**inputs).logits)


class Relevant:
    """Keeps the tokens nearest to the question."""

    needs = frozenset({"text_BD", "projected_BND"})

    def __init__(self):
        self.read = []

    def __call__(self, encoded, budget):
        self.read.append(encoded.text_BD)
        unit_BND = torch.nn.functional.normalize(encoded.projected_BND, dim=-1)
        return top_k_BK((unit_BND @ encoded.text_BD[..., None])[..., 0], budget)


@FAMILIES
@torch.no_grad()
def test_a_reducer_reads_the_text_behind_the_images_of_each_row(model, process):
    inputs, reducer = process(*RAGGED), Relevant()
    reduce(model, inputs, reducer, 0.5)
    read = torch.cat(reducer.read).unique_consecutive(dim=0)
    ids = [process(text)["input_ids"][0, 1:] for text in ("a b", "h", "l")]
    unit = [torch.nn.functional.normalize(model.get_input_embeddings()(i), dim=-1).mean(0) for i in ids]
    torch.testing.assert_close(read, torch.stack(unit))


@FAMILIES
@torch.no_grad()
def test_one_image_is_reduced_anew_for_each_question(model, process):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 60, 3), np.uint8))
    texts = ["<image> a", "<image> b"]
    one, both = process(texts[0], images=[[picture]]), process(*texts, images=[[picture]] * 2)
    asked = {key: both[key] for key in ("input_ids", "attention_mask")}
    shared = replace(prepare(model, one), inputs=asked, image_of=[0, 0])
    kept = indices(shared.reduce(Relevant(), Policy(0.3)))
    alone = [reduce(model, process(text, images=[[picture]]), Relevant(), 0.3) for text in texts]
    assert kept == [*indices(alone[0]), *indices(alone[1])]
    assert kept[0] != kept[1]


@pytest.mark.parametrize("family", ["llava"])
@torch.no_grad()
def test_a_row_without_text_is_refused_where_it_is_read(model, process):
    inputs = process("<image>")
    inputs["input_ids"] = inputs["input_ids"][:, 1:]
    inputs["attention_mask"] = inputs["attention_mask"][:, 1:]
    with pytest.raises(ValueError, match="a row has an image and no text"):
        reduce(model, inputs, Relevant(), 0.5)
