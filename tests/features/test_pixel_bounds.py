"""Bounds of an image's area, against processors that were built with them."""

import json

import numpy as np
import pytest
from PIL import Image
from transformers import AutoImageProcessor, CLIPImageProcessorPil, Idefics3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from atr.features.pixel_bounds import bound_area
from atr.features.preprocess import probe_image

SIZES = ((301, 96), (64, 210), (37, 20), (224, 224), (640, 427))
SHIPPED = {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 14, "merge_size": 2}
"""A checkpoint states the bounds by either name: Qwen2.5-VL's by the first, Qwen3-VL's by the second."""
STATED = (
    {"min_pixels": 3_136, "max_pixels": 50_176},
    {"size": {"shortest_edge": 3_136, "longest_edge": 50_176}},
)


def loaded(folder, stated):
    (folder / "preprocessor_config.json").write_text(json.dumps(SHIPPED | stated))
    return AutoImageProcessor.from_pretrained(folder, backend="pil")


def same_pixels(one, other):
    for size in SIZES:
        pictures = [processor([probe_image(*size)], return_tensors="np") for processor in (one, other)]
        np.testing.assert_array_equal(*(picture["pixel_values"] for picture in pictures))
        np.testing.assert_array_equal(*(picture["image_grid_thw"] for picture in pictures))


@pytest.mark.parametrize("stated", STATED, ids=["pixels", "size"])
def test_the_bounds_are_those_of_a_processor_built_with_them(tmp_path, stated):
    processor = loaded(tmp_path, stated)
    bound_area(processor, 20_000, 40_000, "x")
    same_pixels(processor, Qwen2VLImageProcessorPil(min_pixels=20_000, max_pixels=40_000))


@pytest.mark.parametrize("stated", STATED, ids=["pixels", "size"])
def test_a_bound_that_is_not_given_stays(tmp_path, stated):
    for least, most in ((None, None), (20_000, None), (None, 40_000)):
        processor = loaded(tmp_path, stated)
        bound_area(processor, least, most, "x")
        bounds = {"min_pixels": least or 3_136, "max_pixels": most or 50_176}
        same_pixels(processor, Qwen2VLImageProcessorPil(**bounds))


def test_images_lie_between_the_bounds():
    processor = Qwen2VLImageProcessorPil()
    bound_area(processor, 20_000, 40_000, "x")
    for size in SIZES:
        _, rows, columns = processor([Image.new("RGB", size)])["image_grid_thw"][0]
        assert 20_000 <= rows * columns * 14**2 <= 40_000


@pytest.mark.parametrize("processor", [CLIPImageProcessorPil(), Idefics3ImageProcessorPil()])
def test_a_processor_without_bounds_is_refused_unless_none_are_given(processor):
    before = processor.to_dict()
    bound_area(processor, None, None, "x")
    with pytest.raises(ValueError, match=rf"^tower: .*{type(processor).__name__} sets .* allowed: null$"):
        bound_area(processor, None, 40_000, "tower")
    assert processor.to_dict() == before


def test_bounds_that_exclude_each_other_are_refused():
    processor = Qwen2VLImageProcessorPil(min_pixels=3_136, max_pixels=50_176)
    with pytest.raises(ValueError, match=r"^tower: min_pixels: 3136 .* allowed: at most max_pixels, 3000$"):
        bound_area(processor, None, 3_000, "tower")
