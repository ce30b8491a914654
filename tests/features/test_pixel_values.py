"""The table of pixel values against the image processors that it replaces, bit by bit."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    LlavaNextImageProcessorPil,
    SiglipImageProcessorPil,
    ViTImageProcessorPil,
)

from atr.features.pixel_values import Preprocessor
from atr.features.preprocess import PROBE_SIZES, probe_image

SQUARE = {"height": 28, "width": 28}
PROCESSORS = {
    "clip": CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=SQUARE),
    "clip, not cropped": CLIPImageProcessorPil(size=SQUARE, do_center_crop=False),
    "siglip": SiglipImageProcessorPil(size=SQUARE),
    "dinov2": BitImageProcessorPil(size={"shortest_edge": 32}, crop_size=SQUARE),
    "vit": ViTImageProcessorPil(size=SQUARE),
    "only rescaled": CLIPImageProcessorPil(size=SQUARE, crop_size=SQUARE, do_normalize=False),
    "only normalised": CLIPImageProcessorPil(size=SQUARE, crop_size=SQUARE, do_rescale=False),
    "neither": CLIPImageProcessorPil(size=SQUARE, crop_size=SQUARE, do_rescale=False, do_normalize=False),
}


def images():
    noise = np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8)
    return [*(probe_image(*size) for size in PROBE_SIZES), Image.fromarray(noise)]


def of_processor(processor, pictures):
    return processor(pictures, return_tensors="pt")["pixel_values"]


class Counted:
    """A processor that counts the images it is given."""

    def __init__(self, processor):
        self.given = 0
        self._processor = processor

    def __call__(self, pictures, **options):
        self.given += len(pictures)
        return self._processor(pictures, **options)


@pytest.mark.parametrize("name", PROCESSORS)
def test_pixels_are_those_of_the_processor_bit_by_bit(name):
    preprocess = Preprocessor(PROCESSORS[name])
    for pictures in (images(), images()[-1:] * 2):
        expected = of_processor(PROCESSORS[name], pictures)
        assert preprocess(pictures).dtype == expected.dtype
        assert torch.equal(preprocess(pictures), expected)


@pytest.mark.parametrize(("name", "skipped"), [("clip", True), ("siglip", True), ("dinov2", False)])
def test_only_images_that_keep_their_place_pass_the_processor_by(name, skipped):
    preprocess = Preprocessor(PROCESSORS[name])
    preprocess.processor = Counted(PROCESSORS[name])
    preprocess(images()[-1:])
    assert preprocess.processor.given == (0 if skipped else 1)
    preprocess(images()[:1])
    assert preprocess.processor.given == (1 if skipped else 2)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_other_modes_are_left_to_the_processor(mode):
    picture = images()[-1].convert(mode)
    expected = of_processor(PROCESSORS["clip"], [picture])
    assert torch.equal(Preprocessor(PROCESSORS["clip"])([picture]), expected)


class Stretched(CLIPImageProcessorPil):
    """Stretches each image to its own darkest and brightest value, which no table can give."""

    def _preprocess(self, images, **settings):
        ranges = [(image.min(), max(1, int(np.ptp(image)))) for image in images]
        stretched = [
            ((image - low) * (255.0 / span)).astype(np.uint8)
            for image, (low, span) in zip(images, ranges, strict=True)
        ]
        return super()._preprocess(stretched, **settings)


def test_a_processor_with_steps_of_its_own_is_called_itself():
    own = Stretched(size=SQUARE, crop_size=SQUARE)
    pictures = [Image.new("RGB", (28, 28), (60, 80, 100)), images()[0]]
    assert torch.equal(Preprocessor(own)(pictures), of_processor(own, pictures))


def test_a_processor_of_tiles_is_refused():
    with pytest.raises(ValueError, match="LlavaNextImageProcessorPil cuts images into tiles, allowed: a vis"):
        Preprocessor(LlavaNextImageProcessorPil())(images()[:1])
