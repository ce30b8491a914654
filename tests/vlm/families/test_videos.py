"""Videos beside images, of packed towers: their patches and grids are made by hand as those of images are."""

import warnings

import pytest
import torch

from atr.vlm.families import videos
from atr.vlm.families.proof import HalfByFeature
from atr.vlm.families.table import TABLE
from atr.vlm.families.tiny import tiny_config, tiny_inputs, tiny_model
from atr.vlm.policy import Policy
from atr.vlm.reduce import prepare, reduce

SERVED = sorted(name for name, entry in TABLE.items() if entry.videos)
GRID = (2, 4, 6)
"""Times, and patches of a frame's rows and columns."""


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "model type .*: ")
        yield


def mixed(model, rows=((0,), (1,))):
    """The rows of `tiny_inputs`, each with a video behind its images."""
    inputs = tiny_inputs(model, rows)
    frames, high, wide = GRID
    each = high * wide // 4
    start, end = model.config.vision_start_token_id, model.config.vision_end_token_id
    frame = [start, *[model.config.video_token_id] * each, end]
    is_split = "qwen3" in model.config.model_type  # a frame is a run of its own
    tail = frame * frames if is_split else [start, *[model.config.video_token_id] * (each * frames), end]
    tail = torch.tensor([*tail, 5, 6, 7]).expand(len(rows), -1)
    ids = torch.cat([inputs["input_ids"], tail], 1)
    types = (ids == model.config.image_token_id).long() + 2 * (ids == model.config.video_token_id).long()
    generator = torch.Generator().manual_seed(3)
    width = tiny_inputs(model, ((0,),))["pixel_values"].shape[-1]
    patches = torch.randn(len(rows) * frames * high * wide, width, generator=generator)
    return {
        **inputs,
        "input_ids": ids,
        "attention_mask": torch.cat([inputs["attention_mask"], torch.ones_like(tail)], 1),
        "mm_token_type_ids": types,
        "pixel_values_videos": patches,
        "video_grid_thw": torch.tensor([GRID] * len(rows)),
    }


@pytest.mark.parametrize("model_type", SERVED)
@torch.no_grad()
def test_all_kept_is_the_untouched_model(model_type):
    model = tiny_model(tiny_config(model_type))
    inputs = mixed(model)
    reduced = reduce(model, inputs, HalfByFeature(), 1.0)
    assert set(reduced["mm_encoder_outputs"]) == {"image", "video"}
    own = model(**inputs).logits
    assert torch.equal(model(**reduced).logits, own)
    other = {**inputs, "pixel_values_videos": inputs["pixel_values_videos"].flip(0)}
    assert (model(**other).logits - own).abs().max() > 1e-3
    settings = {"max_new_tokens": 3, "do_sample": False}
    assert torch.equal(
        model.generate(**reduced, **settings)[:, -3:], model.generate(**inputs, **settings)[:, -3:]
    )


@pytest.mark.parametrize("model_type", [name for name in SERVED if "qwen3_5" not in name])
@torch.no_grad()
def test_half_of_the_images_dropped_is_half_masked_and_the_video_is_whole(model_type):
    model = tiny_model(tiny_config(model_type))
    inputs = mixed(model, ((0,),))
    reduced = reduce(model, inputs, HalfByFeature(), 0.5)
    config = model.config
    assert (reduced["input_ids"] == config.video_token_id).sum() == (
        inputs["input_ids"] == config.video_token_id
    ).sum()
    (kept,) = reduced.kept
    assert kept.tokens == kept.of // 2
    stay_L = torch.ones(inputs["input_ids"].shape[1], dtype=torch.bool)
    stay_L[(inputs["input_ids"][0] == config.image_token_id).nonzero()[:, 0]] = False
    first = int((inputs["input_ids"][0] == config.image_token_id).nonzero()[0])
    stay_L[first + kept.indices_K] = True
    known = ("input_ids", "image_grid_thw", "video_grid_thw", "attention_mask", "mm_token_type_ids")
    positions, _ = model.model.get_rope_index(**{key: inputs[key] for key in known})
    masked = {**inputs, "attention_mask": stay_L[None].long(), "position_ids": positions}
    difference = (model(**reduced).logits[0] - model(**masked).logits[0, stay_L]).abs().max()
    assert difference < 1e-5


def test_a_video_alone_stays_whole():
    model = tiny_model(tiny_config("qwen2_5_vl"))
    inputs = mixed(model, ((),))
    reduced = reduce(model, inputs, HalfByFeature(), 0.1)
    assert set(reduced["mm_encoder_outputs"]) == {"video"}
    with torch.no_grad():
        assert torch.equal(model(**reduced).logits, model(**inputs).logits)


def test_a_video_is_encoded_once_for_all_budgets(monkeypatch):
    model = tiny_model(tiny_config("qwen2_5_vl"))
    calls = []
    own = model.model.get_video_features
    monkeypatch.setattr(
        model.model,
        "get_video_features",
        lambda pixel_values_videos, video_grid_thw, **rest: (
            calls.append(1) or own(pixel_values_videos, video_grid_thw, **rest)
        ),
    )
    prepared = prepare(model, mixed(model))
    for keep in (0.25, 0.5):
        assert prepared.reduce(HalfByFeature(), Policy(keep))["mm_encoder_outputs"]["video"] is not None
    assert calls == [1]


def test_that_videos_stay_whole_is_said_once(monkeypatch):
    monkeypatch.setattr(videos, "_SAID", set())
    model = tiny_model(tiny_config("qwen2_5_vl"))
    inputs = mixed(model)
    with pytest.warns(UserWarning, match="qwen2_5_vl: images are reduced, all video tokens are kept"):
        reduce(model, inputs, HalfByFeature(), 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reduce(model, inputs, HalfByFeature(), 0.5)


@pytest.mark.parametrize("model_type", ["gemma4", "glm4v", "llava_onevision", "llava_next_video", "internvl"])
def test_videos_of_a_family_that_is_not_proven_with_them_are_refused_by_name(model_type):
    model = tiny_model(tiny_config(model_type))
    inputs = {**tiny_inputs(model), "pixel_values_videos": torch.zeros(1)}
    with pytest.raises(ValueError, match="inputs: pixel_values_videos cannot be shortened, allowed: "):
        reduce(model, inputs, HalfByFeature(), 0.5)


def test_token_types_are_needed_for_a_video_as_well():
    model = tiny_model(tiny_config("qwen2_5_vl"))
    inputs = mixed(model)
    for key in ("mm_token_type_ids", "pixel_values", "image_grid_thw"):
        del inputs[key]
    with pytest.raises(ValueError, match="inputs: mm_token_type_ids is missing"):
        reduce(model, inputs, HalfByFeature(), 0.5)


@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "qwen3_vl"])
def test_videos_that_do_not_fit_are_refused(model_type):
    model = tiny_model(tiny_config(model_type))
    inputs = mixed(model)
    patches, sizes = inputs["pixel_values_videos"], inputs["video_grid_thw"]
    cases = {
        "^inputs: video_grid_thw is missing, needed with pixel_values_videos$": {"video_grid_thw": None},
        "^input_ids: 24 video placeholders for 0 tokens of videos; ": {"pixel_values_videos": None},
        r"^inputs: pixel_values_videos is \(4, .*, 4 where video_grid_thw \(2, 3\) needs 96$": {
            "pixel_values_videos": patches[:4]
        },
        "^input_ids: 24 video placeholders for 12 tokens of videos; ": {
            "pixel_values_videos": patches[:48], "video_grid_thw": sizes[:1],
        },
        "^inputs: video_grid_thw is a list, allowed: a tensor": {"video_grid_thw": sizes.tolist()},
    }  # fmt: skip
    for message, changed in cases.items():
        given = {key: value for key, value in (inputs | changed).items() if value is not None}
        with pytest.raises(ValueError, match=message):
            reduce(model, given, HalfByFeature(), 0.5)
