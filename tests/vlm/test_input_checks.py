"""What `check_inputs` says of mistakes in preprocessing, made here with torch alone."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    Gemma4ImageProcessorPil,
    GotOcr2ImageProcessorPil,
    PaddleOCRVLImageProcessorPil,
    PixtralImageProcessorPil,
    Qwen2VLImageProcessorPil,
    SiglipImageProcessorPil,
    SmolVLMImageProcessorPil,
)

from atr import check_inputs
from atr.datasets.photographs import photograph
from atr.vlm.families.tiny import tiny_config, tiny_model
from atr.vlm.input_checks import _without_antialias

SIDE = 56
MEAN, STD = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])


@pytest.fixture
def photographs():
    """A wide and a tall one."""
    wide = photograph("coffee")
    return [wide, wide.rotate(90, expand=True)]


@pytest.fixture
def clip(processor):
    processor.image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
    )
    return processor


def preprocess(image, mode="bicubic", antialias=True, mean=MEAN, std=STD, squeeze=False):
    """The arithmetic of CLIP's processor, in floating point throughout."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    height, width = pixels.shape[-2:]
    scale = SIDE / min(height, width)
    size = (SIDE, SIDE) if squeeze else (int(height * scale), int(width * scale))
    options = {} if mode == "nearest" else {"antialias": antialias}
    pixels = F.interpolate(pixels, size, mode=mode, **options)
    top, left = ((side - SIDE) // 2 for side in pixels.shape[-2:])
    pixels = pixels[..., top : top + SIDE, left : left + SIDE] / 255
    return (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def told(model, processor, images, **slip):
    pixels = torch.cat([preprocess(image, **slip) for image in images])
    with pytest.raises(ValueError, match=r"^inputs: pixel_values are not those that [^\n]*$") as raised:
        check_inputs(model, processor, {"pixel_values": pixels}, images)
    return str(raised.value).partition(" makes: ")[2]


@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_onevision"])
def test_what_the_processor_makes_passes_in_any_type(model, processor, photographs):
    made = processor.image_processor(photographs, return_tensors="pt")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        check_inputs(model, processor, made | {"pixel_values": made["pixel_values"].to(dtype)}, photographs)


def test_what_another_library_rounds_otherwise_passes(model, clip, photographs):
    pixels = torch.cat([preprocess(image) for image in photographs])
    assert not torch.equal(pixels, clip.image_processor(photographs, return_tensors="pt")["pixel_values"])
    check_inputs(model, clip, {"pixel_values": pixels}, photographs)


@pytest.mark.parametrize(
    ("slip", "message"),
    [
        ({"antialias": False}, "resized by bicubic without antialias"),
        ({"antialias": False, "mode": "bilinear"}, "resized by bilinear without antialias"),
        ({"mode": "nearest"}, "resized by nearest without antialias"),
        ({"mode": "bilinear"}, "resized by bilinear"),
        ({"squeeze": True}, "the whole image squeezed, not cropped"),
    ],
)
def test_the_slip_is_named(model, clip, photographs, slip, message):
    assert told(model, clip, photographs, **slip) == message
    own = {"mean": [0.5] * 3, "std": [0.5] * 3}
    assert told(model, clip, photographs, **slip, **own).startswith(
        f"{message}, normalised by mean and deviation"
    )


def test_another_mean_and_deviation_are_told(model, clip, photographs):
    message = told(model, clip, photographs, mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
    assert message == (
        "normalised by mean and deviation [0.485, 0.456, 0.406] and [0.229, 0.224, 0.225], "
        "not [0.481, 0.458, 0.408] and [0.269, 0.261, 0.276]"
    )


def test_the_order_of_channels_is_told(model, clip, photographs):
    pixels = clip.image_processor(photographs, return_tensors="pt")["pixel_values"]
    with pytest.raises(ValueError, match="channels in the order blue, green, red"):
        check_inputs(model, clip, {"pixel_values": pixels.flip(1)}, photographs)


def test_of_other_images_the_difference_is_told(model, clip, photographs):
    pixels = clip.image_processor(photographs[::-1], return_tensors="pt")["pixel_values"]
    with pytest.raises(ValueError, match=r"they differ by [1-9]\d+\.\d of 255 levels$"):
        check_inputs(model, clip, {"pixel_values": pixels}, photographs)


def test_an_image_of_one_colour_is_compared_as_well(model, clip):
    grey, black = (Image.new("RGB", (60, 80), colour) for colour in ("grey", "black"))
    pixels = clip.image_processor([grey], return_tensors="pt")["pixel_values"]
    check_inputs(model, clip, {"pixel_values": pixels}, [grey])
    with pytest.raises(ValueError, match="differ by 128"):
        check_inputs(model, clip, {"pixel_values": pixels}, [black])


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
def test_of_tiles_a_missing_antialias_is_told_and_other_sizes_are(model, processor, photographs):
    kind = type(processor.image_processor)

    class Plain(kind):
        def resize(self, image, *args, **kwargs):
            size = super().resize(image, *args, **kwargs).shape[-2:]
            made = F.interpolate(torch.as_tensor(image)[None].float(), size, mode="bicubic")[0]
            return made.clamp(0, 255).byte().numpy()

    plain = Plain(**processor.image_processor.to_dict())
    made = plain(photographs, return_tensors="pt")
    with pytest.raises(ValueError, match="resized by bicubic without antialias"):
        check_inputs(model, processor, made, photographs)
    with pytest.raises(ValueError, match="inputs: image_sizes is "):
        check_inputs(model, processor, made | {"image_sizes": made["image_sizes"].flip(1)}, photographs)


def test_other_shapes_and_what_is_missing_are_told(model, clip, photographs):
    pixels = torch.zeros(2, 3, 28, 28)
    with pytest.raises(ValueError, match=r"pixel_values is \(2, 3, 28, 28\), CLIP.* makes \(2, 3, 56, 56\)"):
        check_inputs(model, clip, {"pixel_values": pixels}, photographs)
    with pytest.raises(ValueError, match="inputs: pixel_values is missing"):
        check_inputs(model, clip, {}, photographs)


def test_a_processor_that_crops_nothing_has_its_slips_named_too(model, processor, photographs):
    processor.image_processor = SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE}, resample=3)
    slip = {"squeeze": True, "mean": [0.5] * 3, "std": [0.5] * 3, "antialias": False}
    assert told(model, processor, photographs, **slip) == "resized by bicubic without antialias"


def test_pixels_that_are_no_numbers_are_no_slip_in_preprocessing(model, clip, photographs):
    pixels = clip.image_processor(photographs, return_tensors="pt")["pixel_values"]
    pixels[1, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"^inputs: pixel_values of images \[1\] of 2 holds NaN"):
        check_inputs(model, clip, {"pixel_values": pixels}, photographs)


def test_a_processor_that_resizes_several_images_at_once_is_understood_as_well():
    """As those of torchvision do, which transformers takes where it is installed."""

    class Together:
        def resize(self, pixels, size):
            return torch.zeros(*pixels.shape[:-2], *size, dtype=pixels.dtype)

    plain = _without_antialias(Together(), "nearest")
    pixels_BCHW = torch.arange(2 * 3 * 8 * 8).reshape(2, 3, 8, 8) % 251
    made_BCHW = plain.resize(pixels_BCHW, (4, 4))
    assert torch.equal(made_BCHW, pixels_BCHW[..., ::2, ::2].float())
    assert torch.equal(made_BCHW[1], plain.resize(pixels_BCHW[1], (4, 4)))


NATIVE = {
    "qwen2_5_vl": Qwen2VLImageProcessorPil(
        size={"shortest_edge": 56 * 56, "longest_edge": 80 * 80}, patch_size=4
    ),
    "paddleocr_vl": PaddleOCRVLImageProcessorPil(
        size={"shortest_edge": 56 * 56, "longest_edge": 80 * 80}, patch_size=4
    ),
    "gemma4": Gemma4ImageProcessorPil(patch_size=4, max_soft_tokens=70),
    "mistral3": PixtralImageProcessorPil(size={"longest_edge": 80}, patch_size=8),
    "internvl": GotOcr2ImageProcessorPil(size={"height": 48, "width": 48}, max_patches=4),
    "smolvlm": SmolVLMImageProcessorPil(size={"longest_edge": 96}, max_image_size={"longest_edge": 48}),
}
"""Image processors whose pixels are patches, tiles or images of their own size."""


@pytest.fixture
def native(family):
    settings = {"crop_to_patches": True} if family == "internvl" else {}
    processor = SimpleNamespace(image_processor=NATIVE[family], images_kwargs=settings)
    return tiny_model(tiny_config(family)), processor


@pytest.mark.parametrize("family", NATIVE)
def test_pixels_of_families_with_grids_of_their_own_are_compared(native, photographs):
    model, processor = native
    made = processor.image_processor(photographs, return_tensors="pt", **processor.images_kwargs)
    check_inputs(model, processor, made, photographs)
    check_inputs(model, processor, made | {"pixel_values": made["pixel_values"].bfloat16()}, photographs)
    with pytest.raises(ValueError, match=r"^inputs: pixel_values is \(.*makes \("):
        check_inputs(model, processor, made | {"pixel_values": made["pixel_values"][..., 1:]}, photographs)


@pytest.mark.parametrize("family", sorted(set(NATIVE) - {"gemma4"}))  # it resizes by a function of its module
def test_a_missing_antialias_and_the_order_of_channels_are_told_of_them(native, photographs):
    model, processor = native
    plain = _without_antialias(processor.image_processor, "bicubic")
    made = plain(photographs, return_tensors="pt", **processor.images_kwargs)
    with pytest.raises(ValueError, match="resized by bicubic without antialias"):
        check_inputs(model, processor, made, photographs)
    blue = [Image.fromarray(np.array(image)[..., ::-1].copy()) for image in photographs]
    made = processor.image_processor(blue, return_tensors="pt", **processor.images_kwargs)
    with pytest.raises(ValueError, match="channels in the order blue, green, red"):
        check_inputs(model, processor, made, photographs)


@pytest.mark.parametrize("family", ["gemma4"])
def test_many_sizes_that_differ_are_counted_and_not_printed(native, photographs):
    model, processor = native
    made = processor.image_processor(photographs, return_tensors="pt")
    moved = made | {"image_position_ids": made["image_position_ids"].flip(-1)}
    with pytest.raises(ValueError, match=r"^inputs: image_position_ids differs .* in \d+ of \d+ values$"):
        check_inputs(model, processor, moved, photographs)
