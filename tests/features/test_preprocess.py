"""Descriptions of image processors agree if and only if their pixels do."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from atr import config
from atr.features.encoder import Encoder
from atr.features.preprocess import PROBE_SIZES, describe_preprocessing, explain_difference, probe_image
from atr.features.wheel_weights import WHEELS

SQUARE = {"height": 28, "width": 28}
CLIP = {"size": {"shortest_edge": 28}, "crop_size": SQUARE}
MEAN = [0.48145466, 0.4578275, 0.40821073]


def clip(**changes):
    return CLIPImageProcessorPil(**CLIP | changes)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"resample": 2}, "resample 3 and 2"),
        ({"image_mean": [0.5, 0.4578275, 0.40821073]}, "image_mean"),
        ({"image_std": [0.5] * 3}, "image_std"),
        ({"rescale_factor": 1 / 256}, "rescale_factor"),
        ({"do_normalize": False}, "do_normalize True and False"),
        ({"do_center_crop": False, "size": SQUARE}, "do_center_crop True and False"),
        ({"size": {"shortest_edge": 32}}, "size"),
        ({"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}, "crop_size"),
    ],
)
def test_a_setting_that_changes_pixels_changes_the_description(changes, told):
    assert told in explain_difference(describe_preprocessing(clip()), describe_preprocessing(clip(**changes)))


@pytest.mark.parametrize(
    "other",
    [
        lambda: clip(image_mean=tuple(MEAN)),
        lambda: BitImageProcessorPil(**CLIP, image_mean=MEAN, image_std=clip().image_std),
        lambda: clip(do_convert_rgb=False),
    ],
)
def test_processors_with_equal_pixels_agree_whatever_their_names(other):
    assert explain_difference(describe_preprocessing(clip()), describe_preprocessing(other())) == ""


def test_processors_with_equal_settings_and_other_pixels_differ():
    class Brighter(CLIPImageProcessorPil):
        def resize(self, *args, **options):
            return super().resize(*args, **options) + 1

    brighter = Brighter(**CLIP)
    brighter.to_dict = clip().to_dict
    assert (
        explain_difference(describe_preprocessing(clip()), describe_preprocessing(brighter))
        == "pixels, with the same settings"
    )


def test_a_description_survives_json():
    assert json.loads(json.dumps(describe_preprocessing(clip()))) == describe_preprocessing(clip())


def test_the_probe_images_are_fixed():
    shapes = [width / height for width, height in PROBE_SIZES]
    assert min(shapes) < 0.5 and max(shapes) > 2
    pixels = np.asarray(probe_image(37, 20)).astype(np.int64)
    assert (pixels.sum(), pixels[7, 31].tolist()) == (283770, [158, 219, 24])


TOWER = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
}
KINDS = {
    "micro": (CLIPVisionModel(CLIPVisionConfig(**TOWER)), clip(image_mean=[0.5] * 3, image_std=[0.5] * 3)),
    "clip-vit-large-patch14-336": (CLIPVisionModel(CLIPVisionConfig(**TOWER)), clip()),
    "siglip-so400m-patch14-384": (
        SiglipVisionModel(SiglipVisionConfig(**TOWER, vision_use_head=False)),
        SiglipImageProcessorPil(size=SQUARE, resample=3),
    ),
    "dinov2-small": (Dinov2Model(Dinov2Config(**TOWER)), WHEELS["facebook/dinov2-small"].processor),
    "dinov2-base": (Dinov2Model(Dinov2Config(**TOWER)), WHEELS["facebook/dinov2-small"].processor),
}
"""For every preset of a plain tower a tiny one and its kind of image processor."""
PLAIN = [name for name, preset in config.ENCODERS.items() if preset.layer != "merged"]
"""tests/features/test_vision_half.py has those of merged tokens."""


@pytest.mark.parametrize("name", PLAIN)
def test_an_encoder_gives_exactly_the_pixels_of_its_processor(name, tmp_path):
    tower, processor = KINDS[name]
    tower.save_pretrained(tmp_path)
    if isinstance(processor, dict):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(dict(processor)))
    else:
        processor.save_pretrained(tmp_path)
    size = 28 if config.ENCODERS[name].size else None
    encoder = Encoder.load(str(tmp_path), layer=1, size=size)
    resized = {"size": SQUARE, "do_center_crop": False} if size else {}
    own = AutoImageProcessor.from_pretrained(str(tmp_path), **resized)
    noise = np.random.default_rng(0).integers(0, 256, (51, 83, 3), dtype=np.uint8)
    for image in (*(probe_image(*sides) for sides in PROBE_SIZES), Image.fromarray(noise)):
        expected = own(image, return_tensors="pt")["pixel_values"]
        assert torch.equal(encoder.preprocess([image]), expected)
    assert describe_preprocessing(encoder.image_processor) == describe_preprocessing(own)
