"""Paints a spot on an image, finds the token that it changes, and looks for the spot in its rectangle.

The image processors are the models' own, with the sizes of the tiny copies: 4 pixels a patch, tiles of 24.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    Ernie4_5_VLMoeImageProcessorPil,
    Gemma3ImageProcessorPil,
    Gemma4ImageProcessorPil,
    Glm4vImageProcessorPil,
    Glm46VImageProcessorPil,
    GotOcr2ImageProcessorPil,
    Idefics3ImageProcessorPil,
    LlavaNextImageProcessorPil,
    LlavaOnevisionImageProcessorPil,
    MiniCPMV4_6ImageProcessorPil,
    Ovis2ImageProcessorPil,
    PaddleOCRVLImageProcessorPil,
    PixtralImageProcessorPil,
    Qwen2VLImageProcessorPil,
    SiglipImageProcessorPil,
    SmolVLMImageProcessorPil,
)

from atr.features.token_grids import image_arguments
from atr.vlm.boxes import token_boxes
from atr.vlm.families import supported_types
from atr.vlm.families.proof import HalfByFeature
from atr.vlm.families.tiny import tiny_config, tiny_model
from atr.vlm.reduce import prepare, reduce
from atr.vlm.sequence import token_types
from atr.vlm.tiling import ROW_END

SIDE, PATCH = 24, 4
SQUARE = {"size": {"height": SIDE, "width": SIDE}}
LARGE = {"size": {"height": 2 * SIDE, "width": 2 * SIDE}}
CROP = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
PACKED = {"size": {"shortest_edge": 24 * 24, "longest_edge": 64 * 64}, "patch_size": PATCH}
TILES = {"crop_to_patches": True, "max_patches": 6}
SPLIT = {"size": {"longest_edge": 4 * SIDE}, "max_image_size": {"longest_edge": SIDE}}


def anyres(kind, **options):
    return lambda config: kind(image_grid_pinpoints=config.image_grid_pinpoints, **options)


def qwen(config):
    return Qwen2VLImageProcessorPil(**PACKED)


PROCESSORS = {
    "llava": lambda config: CLIPImageProcessorPil(**CROP),
    "vipllava": lambda config: CLIPImageProcessorPil(**CROP),
    "llava_next": anyres(LlavaNextImageProcessorPil, **CROP),
    "llava_next_video": anyres(LlavaNextImageProcessorPil, **CROP),
    "llava_onevision": anyres(LlavaOnevisionImageProcessorPil, **SQUARE),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"), qwen),
    **dict.fromkeys(("exaone4_5", "hyperclovax_vision_v2"), qwen),
    "gemma3": lambda config: Gemma3ImageProcessorPil(**LARGE),
    "gemma4": lambda config: Gemma4ImageProcessorPil(patch_size=PATCH, max_soft_tokens=70),
    "paligemma": lambda config: SiglipImageProcessorPil(**SQUARE),
    "internvl": lambda config: GotOcr2ImageProcessorPil(**SQUARE, **TILES),
    "aya_vision": lambda config: GotOcr2ImageProcessorPil(**SQUARE, **TILES),
    "got_ocr2": lambda config: GotOcr2ImageProcessorPil(**LARGE, **TILES),
    "smolvlm": lambda config: SmolVLMImageProcessorPil(**SPLIT),
    "idefics3": lambda config: Idefics3ImageProcessorPil(**SPLIT),
    "mistral3": lambda config: PixtralImageProcessorPil(size={"longest_edge": 64}, patch_size=8),
    "lighton_ocr": lambda config: PixtralImageProcessorPil(size={"longest_edge": 64}, patch_size=8),
    "glm4v": lambda config: Glm4vImageProcessorPil(**PACKED),
    "glm46v": lambda config: Glm46VImageProcessorPil(**PACKED),
    "glm_ocr": lambda config: Glm46VImageProcessorPil(**PACKED),
    "paddleocr_vl": lambda config: PaddleOCRVLImageProcessorPil(**PACKED),
    "ernie4_5_vl_moe": lambda config: Ernie4_5_VLMoeImageProcessorPil(**PACKED),
    "ovis2": lambda config: Ovis2ImageProcessorPil(**SQUARE, **TILES),
    "minicpmv4_6": lambda config: MiniCPMV4_6ImageProcessorPil(
        patch_size=PATCH, scale_resolution=32, max_slice_nums=6
    ),
}
NEED_TORCHVISION = {"cohere2_vision", "kimi_k25", "lfm2_vl"}
"""Their processors do not load here; tests/vlm/test_views.py has their geometry."""
FAST = (
    "llava", "llava_next", "llava_onevision", "qwen2_5_vl", "gemma3", "gemma4", "internvl", "smolvlm",
    "mistral3", "glm4v", "paddleocr_vl", "ovis2", "minicpmv4_6",
)  # fmt: skip
"""A family of each image processor whose geometry is its own."""
FAMILIES = [
    name if name in FAST else pytest.param(name, marks=pytest.mark.exhaustive)
    for name in sorted(set(PROCESSORS) & set(supported_types()))
]
SIZES = [(90, 60), pytest.param((50, 110), marks=pytest.mark.exhaustive)]
FIRST, TAG, LAST = 70, 71, 72
"""Tokens of text in front of runs of placeholders."""


def test_every_family_with_a_processor_is_painted():
    assert set(supported_types()) - NEED_TORCHVISION <= set(PROCESSORS)


def photograph(size):
    pixels = np.random.default_rng(0).integers(90, 160, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def process(model, processor, image):
    """The processor's pixels, with a row of placeholders, a run for each tile where tiles have tags."""
    made = processor([image], return_tensors="pt")
    pixels = {key: torch.as_tensor(made[key]) for key in made if key in image_arguments(model)}
    with torch.no_grad():
        output = model.get_image_features(**pixels, return_dict=True).pooler_output
    lengths = [part.shape[:-1].numel() for part in output]
    if model.config.model_type in ("smolvlm", "idefics3"):
        tiles = made["pixel_values"].shape[1]
        lengths = [sum(lengths) // tiles] * tiles
    elif model.config.model_type == "mistral3":
        rows = int(made["image_sizes"][0][0]) // 8
        lengths = [sum(lengths) // rows] * rows
    elif model.config.model_type in ("internvl", "got_ocr2"):
        lengths = [sum(lengths)]
    runs = [[TAG] + [model.config.image_token_id] * length for length in lengths]
    runs[-1][0], runs[0][0] = LAST, FIRST
    ids = torch.tensor([[5, *(token for run in runs for token in run), 6]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels}
    is_image = (ids == model.config.image_token_id).long()
    return inputs | dict.fromkeys(token_types(model), is_image)


PLACES = [(0.5, 0.5), (0.31, 0.42), (0.77, 0.28), (0.64, 0.83), (0.05, 0.93)]
"""Centres of the spots that are painted, one after another, as fractions of the image's width and height."""
HALF = 2
"""Half of a spot's side in pixels."""


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_painted_spot_lies_in_the_rectangles_of_the_tokens_it_changes(family, size):
    """One in each tile that shows the spot; tokens of other tiles do not change at all."""
    model = tiny_model(tiny_config(family))
    processor, image = PROCESSORS[family](model.config), photograph(size)
    inputs = process(model, processor, image)
    (kept,) = reduce(model, inputs, HalfByFeature(), 1.0, "contiguous", newline="follow").kept
    vision = SimpleNamespace(
        image_processor=processor, vision_aspect_ratio=getattr(model.config, "vision_aspect_ratio", None)
    )
    box_K4 = token_boxes(kept, size, vision)
    (plain_KD,), (tile_K,) = visual_tokens(model, inputs)
    assert len(box_K4) == kept.of == len(plain_KD)
    for x, y in ((round(x * size[0]), round(y * size[1])) for x, y in PLACES):
        painted = image.copy()
        painted.paste((255, 0, 0), (x - HALF, y - HALF, x + HALF, y + HALF))
        (painted_KD,), _ = visual_tokens(model, process(model, processor, painted))
        change_K = (painted_KD - plain_KD).norm(dim=1)
        # OneVision's downsampling mixes tokens of neighbouring tiles.
        most = 0.02 * change_K.max() if family == "llava_onevision" else 0
        for tile in tile_K.unique():
            check_tile(box_K4[tile_K == tile], change_K[tile_K == tile], x, y, most, slack(family, size))


def slack(family, size):
    """Pixels by which a spot may miss the rectangle: half of its side, and half a token of GOT-OCR.

    Two convolutions of stride 2 centre the tokens of GOT-OCR on the corner of their patches.
    """
    return HALF + (max(size) / 12 if family == "got_ocr2" else 0)


def check_tile(box_N4, change_N, x, y, most, slack):
    """The token of a tile that changes most has the spot; in a tile without it tokens change by `most`."""
    wide_4 = torch.tensor([-HALF, -HALF, HALF, HALF])
    area_N = (box_N4[:, 2:] - box_N4[:, :2]).prod(1)
    near_N, over_N = has(box_N4 + 4 * wide_4, x, y), has(box_N4 - wide_4, x, y) & (area_N > 0)
    if over_N.any():
        assert has(box_N4 + wide_4 / HALF * slack, x, y)[change_N.argmax()], (x, y)
    elif not near_N.any():  # resampling spreads a spot by a few pixels
        assert change_N.max() <= most, (x, y)


def has(box_N4, x, y):
    """Which rectangles the point lies in."""
    left_N, top_N, right_N, bottom_N = box_N4.T
    return (left_N <= x) & (x <= right_N) & (top_N <= y) & (y <= bottom_N)


@torch.no_grad()
def visual_tokens(model, inputs):
    """The tokens (P, D) of each image, and the tile (P,) of each, without newlines."""
    prepared = prepare(model, inputs)
    marks = [tile_P != ROW_END for tile_P in prepared.layout.tile_of]
    return tuple(
        [values[mark_P] for values, mark_P in zip(images, marks, strict=True)]
        for images in (prepared.tokens.images, prepared.layout.tile_of)
    )


def test_most_painted_families_cut_images_into_tiles():
    """So that the test above sees arrangements of tiles."""
    tiled = {"llava_next", "llava_onevision", "internvl", "smolvlm"}
    for family in tiled:
        model = tiny_model(tiny_config(family))
        inputs = process(model, PROCESSORS[family](model.config), photograph((90, 60)))
        assert prepare(model, inputs).layout.tiling.tiles[0] > 4, family
