"""Images that an image processor refuses are named, among others and before the others are read."""

import re

import pytest
from PIL import Image

from atr.features.datamodule import ShardBatches
from atr.features.encoder import Encoder
from atr.features.image_shapes import check_shapes, preprocess_named

SIZES = [(60, 40), (450, 2), (40, 60), (1, 1), (1, 3)]
"""The second is of too extreme an aspect ratio for Qwen's processor and for Pixtral's at 112 pixels."""
IDS = [f"docs/{number}" for number in range(len(SIZES))]
NATIVE = {"qwen2_5_vl": "absolute aspect ratio must be smaller than 200", "mistral3": "Size must contain"}


@pytest.fixture(params=NATIVE)
def native(request, hosts):
    """A processor of native resolution, and what it says of an image of extreme aspect ratio."""
    return Encoder.load(str(hosts(request.param)[1]), "merged").preprocess, NATIVE[request.param]


def blank(sizes):
    return [Image.new("RGB", size) for size in sizes]


def test_the_image_that_a_processor_refuses_is_named(native):
    preprocess, reason = native
    told = f"image docs/1: 450 x 2 pixels: {reason}"
    with pytest.raises(ValueError, match=re.escape(told)):
        preprocess_named(preprocess, IDS, blank(SIZES))
    images = list(zip(IDS, blank(SIZES), strict=True))
    with pytest.raises(ValueError, match=re.escape(told)):
        ShardBatches(images, preprocess, 4, 4)[0]
    assert ShardBatches(images, preprocess, 4, 4)[1][1] == ["docs/4"]


def test_extreme_shapes_are_tried_before_any_image_is_read(native):
    preprocess, reason = native
    with pytest.raises(ValueError, match=re.escape(f"image docs/1: 450 x 2 pixels: {reason}")):
        check_shapes(preprocess, IDS, SIZES)
    check_shapes(preprocess, IDS[:1] + IDS[2:], SIZES[:1] + SIZES[2:])
    with pytest.raises(ValueError, match="image tall: 2 x 450 pixels"):
        check_shapes(preprocess, ["wide", "tall"], [(60, 40), (2, 450)])


def test_four_shapes_at_most_are_tried():
    tried = []
    check_shapes(lambda images: tried.extend(image.size for image in images), IDS * 3, SIZES * 3)
    assert tried == [(450, 2), (1, 1), (1, 3)]


@pytest.mark.parametrize(("size", "shape"), [((1, 1), "smallest"), ((3, 900), "narrowest")])
def test_small_images_are_tried(size, shape):
    def refuse(images):
        if images[0].size == size:
            raise ValueError(shape)

    with pytest.raises(ValueError, match=f"image b: {size[0]} x {size[1]} pixels: {shape}"):
        check_shapes(refuse, "abc", [(40, 60), size, (60, 40)])


def test_an_error_of_no_single_image_stays_as_it_is():
    def refuse(images):
        if len(images) > 1:
            raise ValueError("one at a time")

    with pytest.raises(ValueError, match=r"^one at a time$"):
        preprocess_named(refuse, "ab", blank(SIZES[:2]))
