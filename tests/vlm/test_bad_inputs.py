"""What a user may do wrong with a family is said in one line, before the tower runs."""

import re
from functools import cache
from types import SimpleNamespace

import pytest
import torch

from atr.core.fingerprint import fingerprint
from atr.features.merged import vision_tower
from atr.reduction import FeatureSelector
from atr.reduction.limits import NoImage
from atr.reduction.registry import build_reducer
from atr.vlm.compatibility import check_positions, check_selector
from atr.vlm.families import supported_types
from atr.vlm.families.proof import HalfByFeature
from atr.vlm.families.tiny import tiny_config, tiny_model
from atr.vlm.families.tiny_inputs import tiny_inputs
from atr.vlm.policy import Policy
from atr.vlm.reduce import prepare, reduce

FAMILIES = ("llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "gemma3", "internvl", "smolvlm", "mistral3")
TOKEN_TYPES = {
    "qwen2_5_vl": "mm_token_type_ids",
    "qwen3_vl": "mm_token_type_ids",
    "gemma3": "token_type_ids",
    "gemma4": "mm_token_type_ids",
    "paligemma": "token_type_ids",
    "ernie4_5_vl_moe": "moe_mm_token_type_ids",
}
by_family = pytest.mark.parametrize("family", FAMILIES)
by_token_type = pytest.mark.parametrize(("family", "key"), TOKEN_TYPES.items())


@cache
def tiny(family):
    """A tiny copy, to be read only."""
    return tiny_model(tiny_config(family))


@cache
def made_inputs(family):
    return tiny_inputs(tiny(family))


@cache
def without_tower(family):
    """A tiny copy whose tower must not run."""

    def refuse(*_):
        raise AssertionError("the tower runs")

    model = tiny_model(tiny_config(family))
    vision_tower(model).register_forward_pre_hook(refuse)
    model.name_or_path = f"my/{family}"
    return model


@pytest.fixture
def model(family):
    return without_tower(family)


@pytest.fixture
def inputs(family):
    return dict(made_inputs(family))


def refuse(message, model, inputs, keep=0.5, reducer=None, **options):
    with pytest.raises(ValueError, match=message) as raised:
        reduce(model, inputs, reducer or HalfByFeature(), keep, **options)
    assert "\n" not in str(raised.value)


def without(inputs, key):
    return {name: value for name, value in inputs.items() if name != key}


@by_token_type
def test_missing_token_types(model, family, inputs, key):
    message = f"^inputs: {key} is missing, without which {family} misreads images$"
    refuse(message, model, without(inputs, key))


@by_token_type
def test_token_types_of_another_length(model, inputs, key):
    rows, length = inputs["input_ids"].shape
    message = (
        rf"^inputs: {key} is \({rows}, {length - 1}\), input_ids is \({rows}, {length}\), allowed: the same"
    )
    refuse(message, model, inputs | {key: inputs[key][:, 1:]})


@by_family
@pytest.mark.parametrize("key", ["input_ids", "attention_mask", "pixel_values"])
def test_lists_in_place_of_tensors(model, inputs, key):
    message = rf'^inputs: {key} is a list, allowed: a tensor, as of return_tensors="pt"$'
    refuse(message, model, inputs | {key: list(inputs[key])})


@by_family
def test_pixels_as_arrays(model, inputs):
    arrays = inputs | {"pixel_values": inputs["pixel_values"].numpy()}
    refuse("^inputs: pixel_values is a ndarray, allowed: a tensor", model, arrays)


@by_family
def test_features_that_are_encoded_already(model, inputs):
    given = inputs | {"mm_encoder_outputs": {"image": torch.zeros(1)}}
    refuse("^inputs: mm_encoder_outputs cannot be shortened, allowed: attention_mask, ", model, given)


@by_family
def test_a_prompt_that_is_no_batch(model, inputs):
    for key in ("input_ids", "attention_mask"):
        inputs[key] = inputs[key][0]
    refuse(r"^inputs: input_ids is \(\d+,\), allowed: \(rows, tokens\)$", model, inputs)


@by_family
def test_a_mask_of_another_length(model, inputs):
    refuse("^inputs: attention_mask is .*, input_ids is .*, allowed: the same shape$", model,
           inputs | {"attention_mask": inputs["attention_mask"][:, 1:]})  # fmt: skip


@by_family
def test_pixels_without_an_image(model, inputs):
    refuse(r"^inputs: pixel_values is \(0, .*, allowed: images, or none for a text alone$", model,
           inputs | {"pixel_values": inputs["pixel_values"][:0]})  # fmt: skip


@by_family
def test_placeholders_without_images(model, inputs):
    refuse(r"^input_ids: \d+ image placeholders for 0 tokens of 0 images", model,
           without(inputs, "pixel_values"))  # fmt: skip


@by_family
def test_images_without_a_prompt(model, inputs):
    refuse("^inputs: input_ids is missing, needed: attention_mask, input_ids$", model,
           without(inputs, "input_ids"))  # fmt: skip


@pytest.mark.parametrize(
    "family", ["qwen2_5_vl", "mistral3", "lfm2_vl", "gemma4", "minicpmv4_6", "llava_next"]
)
def test_missing_sizes_of_images(model, inputs):
    sizes = {"image_grid_thw", "image_sizes", "spatial_shapes", "image_position_ids", "target_sizes"}
    (key,) = sizes & set(inputs)
    refuse(f"^inputs: {key} is missing, needed with pixel_values$", model, without(inputs, key))


@pytest.mark.parametrize("family", ["llava", "gemma3", "internvl", "smolvlm", "mistral3"])
def test_videos_in_a_family_that_is_not_proven_with_them(model, inputs):
    message = "^inputs: pixel_values_videos cannot be shortened, allowed: attention_mask, "
    refuse(message, model, inputs | {"pixel_values_videos": inputs["pixel_values"]})


@by_family
@pytest.mark.parametrize("keep", [0, 0.0])
def test_a_budget_that_leaves_no_token(model, inputs, keep):
    for budget in ("image", "tile"):
        message = f"^keep: {keep} leaves no visual token, allowed: more, or NoImage instead of HalfByFeature$"
        refuse(message, model, inputs, keep, budget=budget)


@by_family
@torch.no_grad()
def test_a_small_fraction_leaves_a_token_and_no_image_leaves_none(family, inputs):
    model = tiny(family)
    assert [kept.tokens for kept in reduce(model, inputs, HalfByFeature(), 0.001).kept] == [1, 1, 1]
    assert [kept.tokens for kept in reduce(model, inputs, NoImage(), 0).kept] == [0, 0, 0]
    prepared = prepare(model, inputs)
    with pytest.raises(ValueError, match=r"^keep: 0 leaves no visual token"):
        prepared.reduce(HalfByFeature(), Policy(0))


def packed(model, patches, tokens):
    """Inputs of one image of `patches` (rows, columns) and so many placeholders."""
    inputs = tiny_inputs(model, ((0,),))
    width = inputs["pixel_values"].shape[1]
    place, text = model.config.image_token_id, torch.tensor([[5, 6, 7]])
    ids = torch.cat([text, torch.full((1, tokens), place), text], 1)
    made = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(patches[0] * patches[1], width),
        "image_grid_thw": torch.tensor([[1, *patches]]),
    }
    types = {key: (ids == place).long() for key in inputs if "type_ids" in key}
    return made | types


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v", "paddleocr_vl"])
def test_an_image_of_fewer_patches_than_a_token(model):
    message = r"^inputs: image or tile 0 is \(1, 1\) patches, less than one token of \(2, 2\)$"
    refuse(message, model, packed(model, (1, 1), 0) | {"pixel_values": torch.randn(1, 96)})


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "glm4v"])
@pytest.mark.parametrize("grid", [(1, 1), (1, 200), (200, 1)])
@torch.no_grad()
def test_images_of_one_token_and_of_extreme_shapes_are_served(family, grid):
    """A processor of transformers refuses more than 200 to 1 itself."""
    model = tiny(family)
    inputs = packed(model, (2 * grid[0], 2 * grid[1]), grid[0] * grid[1])
    reduced = reduce(model, inputs, HalfByFeature(), 0.25)
    (kept,) = reduced.kept
    assert kept.tiles == (grid,) and kept.tokens == max(1, grid[0] * grid[1] // 4)
    assert model(**reduced).logits.isfinite().all()


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava", "internvl"])
@torch.no_grad()
def test_an_image_without_text_is_refused_by_reducers_that_need_text_alone(family):
    model = tiny(family)
    inputs = tiny_inputs(model, ((0,),))
    place_BL = inputs["input_ids"] == model.config.image_token_id
    bare = inputs | {
        key: value[place_BL][None] for key, value in inputs.items() if value.shape == place_BL.shape
    }
    assert reduce(model, bare, HalfByFeature(), 0.5).kept[0].tokens
    refuse("^inputs: a row has an image and no text, which the reducer needs$", model, bare,
           reducer=build_reducer("cdpruner_text"))  # fmt: skip


def selector(width, layer="merged", **record):
    built = FeatureSelector(width, (4, 4), layers=1, heads=2, encoder="other/tower", layer=layer)
    built.note(**record)
    return built


@pytest.mark.parametrize("family", [name for name in supported_types() if name in FAMILIES[2:]])
def test_a_selector_of_the_familys_own_features_fits(model):
    own = fingerprint(vision_tower(model))
    check_selector(model, selector(32, fingerprint=own))
    check_selector(model, selector(32, layer=1, fingerprint=own))


@pytest.mark.parametrize("family", FAMILIES[2:])
def test_a_selector_of_another_familys_tower(model, family, inputs):
    other = tiny_model(tiny_config(family), seed=1)
    foreign = selector(32, fingerprint=fingerprint(vision_tower(other)))
    message = (
        f"^the selector was trained on encoder other/tower, whose weights .* that my/{family} has, though"
    )
    refuse(message, model, inputs, reducer=foreign)


@pytest.mark.parametrize("family", FAMILIES[2:])
@pytest.mark.parametrize("layer", ["merged", 1])
def test_a_selector_of_another_width(model, family, inputs, layer):
    message = (
        f"^the selector was trained on layer {layer} of encoder other/tower, features of width 48; "
        f"my/{family} has width 32 there$"
    )
    refuse(message, model, inputs, reducer=selector(48, layer))


@pytest.mark.parametrize("family", FAMILIES[2:])
@pytest.mark.parametrize("layer", [0, 3, -3])
def test_a_selector_of_a_layer_that_the_tower_lacks(model, family, inputs, layer):
    message = (
        f"^the selector was trained on layer {layer} of encoder other/tower, features of width 32; "
        f"the tower of my/{family} has layers 1 to 2$"
    )
    refuse(message, model, inputs, reducer=selector(32, layer))


@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_onevision"])
def test_a_selector_of_merged_tokens_on_a_llava(model, family, inputs):
    own = FeatureSelector(32, (6, 6), layers=1, heads=2, encoder="other/tower", layer="merged")
    message = (
        rf"^the selector was trained on layer merged of encoder other/tower, \[6, 6, 32\] \(rows, columns, "
        rf"width\); my/{family} reads layer "
    )
    refuse(message, model, inputs, reducer=own)


@pytest.mark.parametrize("family", ["exaone4_5", "hyperclovax_vision_v2"])
def test_positions_that_generate_throws_away(model, family, inputs):
    check_positions(model, "contiguous")
    message = (
        f"^positions: original is not supported by {family}, whose generate drops position ids, allowed: con"
    )
    refuse(message, model, inputs, positions="original")


def test_a_model_without_the_hook_is_refused_by_name():
    model = SimpleNamespace(config=SimpleNamespace(model_type="mllama"))
    refuse(f"^model type 'mllama' is not supported, allowed: {re.escape('llava, llava_next')}", model, {})


@pytest.mark.parametrize(("family", "key"), [item for item in TOKEN_TYPES.items() if item[0] != "paligemma"])
def test_token_types_that_have_images_as_text(model, inputs, key):
    """As a tokenizer makes them that is asked for token types without the processor."""
    message = f"^inputs: {key} is 0 \\(text\\) at an image placeholder of input_ids, allowed: "
    refuse(message, model, inputs | {key: torch.zeros_like(inputs[key])})


@pytest.mark.parametrize(
    ("family", "needed"),
    [
        ("qwen2_5_vl", r"\(24, 96\), 24 where image_grid_thw \(3, 3\) needs 64"),
        ("gemma4", r"\(1, 54, 48\), 1 x 54 where image_position_ids \(3, 54, 2\) needs 3 x 54"),
        ("mistral3", r"\(1, 3, 24, 24\), 1 where image_sizes \(3, 2\) needs 3"),
        ("lfm2_vl", r"\(1, 24, 48\), 1 where spatial_shapes \(5, 2\) needs 5"),
        ("minicpmv4_6", r"\(1, 3, 4, 384\), 384 where target_sizes \(5, 2\) needs 1408"),
    ],
)
def test_pixels_of_fewer_images_than_their_sizes(model, family, inputs, needed):
    """Gemma 4 would broadcast one image to all others without a word."""
    pixels = inputs["pixel_values"]
    fewer = {"qwen2_5_vl": pixels[:24], "minicpmv4_6": pixels[..., :384]}.get(family, pixels[:1])
    refuse(f"^inputs: pixel_values is {needed}$", model, inputs | {"pixel_values": fewer})


@pytest.mark.parametrize("family", ["llava", "gemma3", "internvl", "mistral3"])
def test_pixels_without_an_axis_of_images(model, inputs):
    refuse(r"^inputs: pixel_values is \(3, \d+, \d+\), allowed: \(tiles, channels, rows, columns\)$", model,
           inputs | {"pixel_values": inputs["pixel_values"][0]})  # fmt: skip


@pytest.mark.parametrize("family", ["qwen2_5_vl", "mistral3", "llava_next"])
def test_sizes_without_an_axis_of_images(model, inputs):
    (key,) = {"image_grid_thw", "image_sizes"} & set(inputs)
    refuse(rf"^inputs: {key} is \(\d,\), allowed: \(images", model, inputs | {key: inputs[key][0]})


@pytest.mark.parametrize("family", ["qwen2_5_vl", "mistral3"])
def test_sizes_as_lists(model, inputs):
    (key,) = {"image_grid_thw", "image_sizes"} & set(inputs)
    refuse(f"^inputs: {key} is a list, allowed: a tensor", model, inputs | {key: inputs[key].tolist()})


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_prompts_that_are_none(model, inputs):
    refuse("^inputs: it is a list, allowed: the mapping that ", model, list(inputs.items()))
    refuse(r"^inputs: input_ids is torch\.float32, allowed: integers$", model,
           inputs | {"input_ids": inputs["input_ids"].float()})  # fmt: skip
    mask = inputs["attention_mask"].clone()
    mask[1] = 0
    refuse("^inputs: attention_mask hides all of row 1$", model, inputs | {"attention_mask": mask})


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_what_is_no_model_or_no_reducer(model, inputs):
    for other in (model.base_model, None):
        refuse(f"^model: {type(other).__name__} does not generate, allowed: ", other, inputs)
    for other in ("divprune", HalfByFeature, 3):
        refuse("^reducer: .* is none, allowed: a FeatureSelector, or what build_reducer gives$", model,
               inputs, reducer=other)  # fmt: skip
    refuse("^reducer: FastV chooses between the layers of a language model, allowed: ", model, inputs,
           reducer=build_reducer("fastv"))  # fmt: skip
