"""Where tokens lie, read from an image whose colours are coordinates after each processor has resized it."""

import sys
from importlib import import_module
from inspect import signature
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    Gemma3ImageProcessorPil,
    Gemma4ImageProcessorPil,
    Glm4vImageProcessorPil,
    Glm46VImageProcessorPil,
    GotOcr2ImageProcessorPil,
    Idefics3ImageProcessorPil,
    LlavaImageProcessorPil,
    MiniCPMV4_6ImageProcessorPil,
    Ovis2ImageProcessorPil,
    PaddleOCRVLImageProcessorPil,
    PixtralImageProcessorPil,
    Qwen2VLImageProcessorPil,
    SiglipImageProcessorPil,
    SmolVLMImageProcessorPil,
    ViTImageProcessorPil,
    image_processing_backends,
)
from transformers.image_utils import SizeDict

from atr.vlm.boxes import token_boxes
from atr.vlm.reduce import Kept

PLAIN = {"do_normalize": False, "do_rescale": False}
"""The processors' settings, so that pixels stay levels of 255."""
SIZES = [(97, 61), (61, 97), (160, 40), (48, 171), (72, 72), (400, 300), (237, 511)]
"""Width and height of images."""
TILED = {"size": {"height": 48, "width": 48}, "max_patches": 6}
EDGES = {"size": {"shortest_edge": 24 * 24, "longest_edge": 96 * 96}, "patch_size": 6}


def coordinates(width, height):
    """An image whose red is its column and whose green is its row, as fractions of 255."""
    across, down = np.linspace(0, 255, width), np.linspace(0, 255, height)
    levels = np.stack(np.broadcast_arrays(across, down[:, None], np.zeros(())), axis=-1)
    return Image.fromarray(levels.round().astype(np.uint8))


def grids_of(tiles, grid):
    """Mean level of the tokens of tiles of one grid, (rows * columns, channels) each."""
    return [F.adaptive_avg_pool2d(tile.float(), grid).flatten(1).T for tile in tiles]


def of_tiles(made, grid=(4, 4)):
    pixels = torch.as_tensor(np.asarray(made["pixel_values"])).flatten(0, -4)
    if "pixel_attention_mask" in made:
        pixels = pixels[made["pixel_attention_mask"].flatten(0, 1).flatten(1).any(1)]
    return [grid] * len(pixels), grids_of(pixels, grid)


def of_merge_blocks(made, merge=2):
    """Patches of a merge block in a row, as Qwen has them."""
    _, rows, columns = made["image_grid_thw"][0].tolist()
    patches = made["pixel_values"]
    tokens = patches.view(len(patches) // merge**2, merge**2, 3, -1).float().mean((1, 3))
    return [(rows // merge, columns // merge)], [tokens]


def of_patches(made, merge=2):
    """Patches in raster order, as PaddleOCR and Kimi have them."""
    _, rows, columns = made["image_grid_thw"][0].tolist()
    grid = (rows // merge, columns // merge)
    levels = made["pixel_values"].float().mean((-1, -2)).T.reshape(-1, rows, columns)
    return [grid], grids_of([levels], grid)


def of_pixtral(made, token=8):
    height, width = made["image_sizes"][0]
    grid = (int(height) // token, int(width) // token)
    return [grid], grids_of([torch.as_tensor(np.asarray(made["pixel_values"]))[0]], grid)


def of_gemma4(made, pool=3):
    (patches,), (places,) = made["pixel_values"], made["image_position_ids"]
    columns, rows = (places.amax(0) + 1).tolist()
    levels = patches[: rows * columns].float().view(rows, columns, -1, 3).mean(2).permute(2, 0, 1)
    grid = (rows // pool, columns // pool)
    return [grid], grids_of([levels], grid)


def of_slices(made, merge=4):
    patch = made["pixel_values"].shape[2]
    sizes = [tuple(size) for size in made["target_sizes"].tolist()]
    strips = made["pixel_values"][0].split([rows * columns * patch for rows, columns in sizes], dim=-1)
    grids = [(rows // merge, columns // merge) for rows, columns in sizes]
    images = [
        strip.view(3, patch, rows, columns, patch).float().mean((1, 4))
        for strip, (rows, columns) in zip(strips, sizes, strict=True)
    ]
    return grids, [grids_of([image], grid)[0] for image, grid in zip(images, grids, strict=True)]


def minicpm():
    return MiniCPMV4_6ImageProcessorPil(**PLAIN, scale_resolution=48, patch_size=3, max_slice_nums=6)


def squeezed(kind, **options):
    return lambda: kind(**PLAIN, size={"height": 48, "width": 48}, **options)


CROPPED = {"size": {"shortest_edge": 48}, "crop_size": {"height": 40, "width": 40}}
CASES = {
    "clip": (lambda: CLIPImageProcessorPil(**PLAIN, **CROPPED), of_tiles),
    "clip, a crop that pads": (
        lambda: CLIPImageProcessorPil(
            **PLAIN, size={"shortest_edge": 40}, crop_size={"height": 48, "width": 48}
        ),
        of_tiles,
    ),
    "llava, padded": (lambda: LlavaImageProcessorPil(**PLAIN, **CROPPED, do_pad=True), of_tiles),
    "llava, cropped": (lambda: LlavaImageProcessorPil(**PLAIN, **CROPPED, do_pad=False), of_tiles),
    "siglip": (squeezed(SiglipImageProcessorPil), of_tiles),
    "vit": (squeezed(ViTImageProcessorPil), of_tiles),
    "gemma3": (squeezed(Gemma3ImageProcessorPil), of_tiles),
    "qwen2_vl": (lambda: Qwen2VLImageProcessorPil(**PLAIN, **EDGES), of_merge_blocks),
    "glm4v": (lambda: Glm4vImageProcessorPil(**PLAIN, **EDGES), of_merge_blocks),
    "glm46v": (lambda: Glm46VImageProcessorPil(**PLAIN, **EDGES), of_merge_blocks),
    "paddleocr_vl": (lambda: PaddleOCRVLImageProcessorPil(**PLAIN, **EDGES), of_patches),
    "pixtral": (
        lambda: PixtralImageProcessorPil(
            **PLAIN, size={"longest_edge": 64}, patch_size={"height": 8, "width": 8}
        ),
        of_pixtral,
    ),
    "gemma4": (lambda: Gemma4ImageProcessorPil(**PLAIN, max_soft_tokens=70, patch_size=4), of_gemma4),
    "got_ocr2": (lambda: GotOcr2ImageProcessorPil(**PLAIN, **TILED, crop_to_patches=True), of_tiles),
    "got_ocr2, one tile": (lambda: GotOcr2ImageProcessorPil(**PLAIN, **TILED), of_tiles),
    "ovis2": (lambda: Ovis2ImageProcessorPil(**PLAIN, **TILED, crop_to_patches=True), of_tiles),
    "ovis2, by ratio": (
        lambda: Ovis2ImageProcessorPil(
            **PLAIN, **TILED, crop_to_patches=True, use_covering_area_grid=False
        ),
        of_tiles,
    ),
    "idefics3": (
        lambda: Idefics3ImageProcessorPil(
            **PLAIN, size={"longest_edge": 96}, max_image_size={"longest_edge": 32}
        ),
        of_tiles,
    ),
    "smolvlm": (
        lambda: SmolVLMImageProcessorPil(
            **PLAIN, size={"longest_edge": 128}, max_image_size={"longest_edge": 48}
        ),
        of_tiles,
    ),
    "smolvlm, not split": (
        lambda: SmolVLMImageProcessorPil(
            **PLAIN, size={"longest_edge": 96}, max_image_size={"longest_edge": 32}, do_image_splitting=False
        ),
        of_tiles,
    ),
    "minicpmv4_6": (minicpm, of_slices),
}  # fmt: skip


def kept(tiles, of=None):
    """All tokens of an image without newlines."""
    tokens = sum(rows * columns for rows, columns in tiles) if of is None else of
    return Kept(tokens, tokens, 0, torch.arange(tokens), tuple(tiles))


def check_places(processor, size, tiles, level_P3, indices_K=None, pads=False):
    """The middle of each rectangle has the colour of its token; border tokens count unless it pads."""
    indices_K = torch.arange(len(level_P3)) if indices_K is None else indices_K
    tokens = Kept(len(level_P3), len(level_P3), 0, indices_K, tuple(tiles))
    box_P4 = token_boxes(tokens, size, processor)
    assert box_P4.shape == (len(level_P3), 4) and box_P4.dtype == torch.float32
    side_2 = torch.tensor(size, dtype=torch.float32)
    middle_P2, span_P2 = (box_P4[:, :2] + box_P4[:, 2:]) / 2, box_P4[:, 2:] - box_P4[:, :2]
    found_P2 = level_P3[:, :2] / 255 * (side_2 - 1) + 0.5
    within_P = (box_P4[:, :2] > 0).all(1) & (box_P4[:, 2:] < side_2).all(1)
    counts_P = within_P | torch.tensor(not pads)
    off_P2 = (middle_P2 - found_P2).abs()
    # A quarter of a token, and what 8 bits round.
    assert (off_P2 <= span_P2 / 4 + side_2 / 255)[counts_P].all(), (size, off_P2.max(0).values)
    return counts_P


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_tokens_lie_where_the_processor_took_them_from(case, size):
    make, read = CASES[case]
    processor = make()
    made = processor([coordinates(*size)], return_tensors="pt")
    tiles, levels = read(made)
    check_places(processor, size, tiles, torch.cat(levels), pads="pad" in case)


def packed_levels(model, processor, made, size):
    """The mean levels of LLaVA-NeXT's or OneVision's tokens, packed by the model; NaN for newlines."""
    tiles = torch.stack(grids_of(torch.as_tensor(np.asarray(made["pixel_values"][0])), (4, 4)))
    options = {"vision_feature_select_strategy": "default"}
    if hasattr(processor, "vision_aspect_ratio"):
        options = {"vision_aspect_ratio": processor.vision_aspect_ratio}
    newline_3 = torch.full((3,), torch.nan)
    packed, _ = model.model.pack_image_features([tiles], [size[::-1]], image_newline=newline_3, **options)
    return len(tiles), packed[0]


@pytest.mark.parametrize("size", [*SIZES, (30, 300), (300, 30), (28, 28), (84, 56)], ids=str)
@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
def test_tokens_of_tiles_without_padding_lie_where_they_were_taken_from(model, processor, size):
    for name, value in PLAIN.items():
        setattr(processor.image_processor, name, value)
    made = processor.image_processor([coordinates(*size)], return_tensors="pt")
    count, level_P3 = packed_levels(model, processor, made, size)
    token_P = ~level_P3[:, 0].isnan()
    whole = kept(((4, 4),) * count, int(token_P.sum()))
    indices_K = torch.arange(len(level_P3))[token_P]
    assert torch.equal(
        token_boxes(Kept(whole.tokens, whole.of, 0, indices_K, whole.tiles), size, processor),
        token_boxes(
            Kept(whole.tokens, whole.of, 0, torch.arange(len(level_P3)), whole.tiles), size, processor
        ),
    )
    check_places(processor, size, whole.tiles, level_P3[token_P], torch.arange(len(level_P3)), pads=True)


@pytest.mark.parametrize("family", ["llava_onevision"])
def test_one_of_several_images_is_padded_to_a_square(model, processor):
    for name, value in PLAIN.items():
        setattr(processor.image_processor, name, value)
    made = processor.image_processor([[coordinates(97, 61), coordinates(61, 97)]], return_tensors="pt")
    for tile, size in zip(made["pixel_values"][:, 0], [(97, 61), (61, 97)], strict=True):
        (level_N3,) = grids_of([torch.as_tensor(tile)], (4, 4))
        inside_N = check_places(processor, size, ((4, 4),), level_N3, torch.arange(17), pads=True)
        assert 0 < inside_N.sum() < 16


def resize(image, size, **_):
    return F.interpolate(image.float(), tuple(size), mode="bilinear", antialias=True)


def pad(image, padding, fill=0, **_):
    left, top, right, bottom = padding
    return F.pad(image, (left, right, top, bottom), value=fill)


@pytest.fixture
def torchvision(monkeypatch):
    """What image processors without a PIL version use of torchvision, which is not installed here."""
    modes = SimpleNamespace(BILINEAR="bilinear", LANCZOS="lanczos")
    functional = SimpleNamespace(resize=resize, pad=pad, InterpolationMode=modes)
    for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.v2"):
        module = ModuleType(name)
        module.functional = functional
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(image_processing_backends, "tvF", functional, raising=False)
    yield
    for name in ("lfm2_vl", "kimi_k25", "cohere2_vision"):
        sys.modules.pop(f"transformers.models.{name}.image_processing_{name}", None)


def preprocess(family, class_name, shape, settings):
    """A torchvision processor without its constructor, which refuses, and what it makes of coordinates."""
    module = import_module(f"transformers.models.{family}.image_processing_{family}")
    kind = getattr(module, class_name)
    processor = kind.__new__(kind)
    for name, value in settings.items():
        setattr(processor, name, value)
    names = signature(kind._preprocess).parameters.keys() - {"self", "images", "kwargs"}
    plain = {"resample": None, "return_tensors": "pt", "do_pad": True, "disable_grouping": None, **PLAIN}
    plain |= {"image_mean": (0.0,) * 3, "image_std": (1.0,) * 3}
    own = {name: getattr(processor, name) for name in names - plain.keys() if hasattr(processor, name)}
    image = torch.from_numpy(np.array(coordinates(*shape))).permute(2, 0, 1)
    return processor, processor._preprocess([image], **{name: plain.get(name) for name in names} | own)


def of_lfm2(made, patch=4, merge=2):
    sizes = [tuple(size) for size in made["spatial_shapes"].tolist()]
    grids = [(rows // merge, columns // merge) for rows, columns in sizes]
    levels = [
        patches[: rows * columns].view(rows, columns, -1, 3).float().mean(2).permute(2, 0, 1)
        for patches, (rows, columns) in zip(made["pixel_values"], sizes, strict=True)
    ]
    return grids, [grids_of([level], grid)[0] for level, grid in zip(levels, grids, strict=True)]


LFM2 = {
    "tile_size": 32, "encoder_patch_size": 4, "min_image_tokens": 4, "max_image_tokens": 16, "max_tiles": 6,
}  # fmt: skip
NEED_TORCHVISION = {
    "cohere2_vision": ("Cohere2VisionImageProcessor", of_tiles, TILED | {"size": SizeDict(**TILED["size"])}),
    "kimi_k25": (
        "Kimi_K25ImageProcessor",
        of_patches,
        {"size": SizeDict(max_height=96, max_width=96), "patch_size": 6, "max_patches": 120},
    ),
    "lfm2_vl": ("Lfm2VlImageProcessor", of_lfm2, LFM2),
}


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("family_name", NEED_TORCHVISION)
def test_tokens_of_processors_that_need_torchvision(torchvision, family_name, size):
    class_name, read, settings = NEED_TORCHVISION[family_name]
    processor, made = preprocess(family_name, class_name, size, settings)
    tiles, levels = read(made)
    check_places(processor, size, tiles, torch.cat(levels), pads=family_name == "kimi_k25")


def test_a_thumbnail_that_is_switched_off_is_not_expected(torchvision):
    processor, made = preprocess(
        "lfm2_vl", "Lfm2VlImageProcessor", (160, 90), LFM2 | {"use_thumbnail": False}
    )
    tiles, levels = of_lfm2(made)
    assert len(tiles) > 1
    check_places(processor, (160, 90), tiles, torch.cat(levels))


def test_most_cases_have_images_of_several_tiles():
    """So that the tests above see arrangements."""
    for case in ("got_ocr2", "ovis2", "ovis2, by ratio", "idefics3", "smolvlm", "minicpmv4_6"):
        make, read = CASES[case]
        counts = {len(read(make()([coordinates(*size)], return_tensors="pt"))[0]) for size in SIZES}
        assert len(counts) > 1 and max(counts) > 4, case


def test_settings_that_a_processor_gives_in_every_call_count():
    images = GotOcr2ImageProcessorPil(**PLAIN, **TILED)
    processor = SimpleNamespace(image_processor=images, images_kwargs={"max_patches": 2})
    made = images([coordinates(160, 90)], return_tensors="pt", crop_to_patches=True, max_patches=2)
    tiles, levels = of_tiles(made)
    assert len(tiles) == 3
    check_places(processor, (160, 90), tiles, torch.cat(levels))
    assert images.max_patches == 6, "a copy is configured"


def test_kept_tokens_alone_have_rectangles_in_their_order():
    processor = CASES["siglip"][0]()
    indices_K = torch.tensor([1, 4, 15])
    some = Kept(3, 16, 0, indices_K, ((4, 4),))
    every_P4 = token_boxes(kept(((4, 4),)), (80, 40), processor)
    assert torch.equal(token_boxes(some, (80, 40), processor), every_P4[indices_K])
    assert every_P4[4].tolist() == [0, 10, 20, 20] and every_P4[-1].tolist() == [60, 30, 80, 40]


def test_tokens_of_padding_alone_have_no_area():
    processor = LlavaImageProcessorPil(**PLAIN, **CROPPED, do_pad=True)
    box_P4 = token_boxes(kept(((10, 10),)), (100, 20), processor)
    area_P = (box_P4[:, 2:] - box_P4[:, :2]).prod(1)
    assert (area_P == 0).sum() == 60 and area_P.sum().item() == pytest.approx(100 / 6 * 5 * 20, rel=0.01)
    assert (box_P4 >= 0).all() and (box_P4 <= torch.tensor([100, 20, 100, 20])).all()


def test_what_has_no_place_is_refused():
    siglip = CASES["siglip"][0]()
    with pytest.raises(ValueError, match=r"^kept: the tokens of this family have no place in the image$"):
        token_boxes(kept((), 3), (80, 40), siglip)
    with pytest.raises(
        ValueError, match=r"^processor: the views of SimpleNamespace are unknown, allowed: CL"
    ):
        token_boxes(kept(((4, 4),)), (80, 40), SimpleNamespace())
    tiled = CASES["got_ocr2"][0]()
    message = (
        r"^size: GotOcr2ImageProcessorPil does not cut an image of 80 x 80 pixels into 3 tiles of 48 tokens, "
        r"allowed: size of this input's image, and its processor with the same settings$"
    )
    with pytest.raises(ValueError, match=message):
        token_boxes(kept(((4, 4),) * 3), (80, 80), tiled)
    with pytest.raises(ValueError, match="allowed: do_pan_and_scan=False"):
        token_boxes(kept(((4, 4),)), (80, 40), Gemma3ImageProcessorPil(do_pan_and_scan=True))
    odd = CLIPImageProcessorPil(size={"shortest_edge": 20, "longest_edge": 40})
    with pytest.raises(ValueError, match=r"has size .*, allowed: shortest_edge, or height and width$"):
        token_boxes(kept(((4, 4),)), (80, 40), odd)


@pytest.mark.parametrize("size", [None, (40,), (40, 0), (-1, 40), "40", (40, 20, 3)])
def test_what_is_no_size_is_refused(size):
    message = r"^size: .* is not allowed, allowed: \(width, height\) in pixels, as Image\.size$"
    with pytest.raises(ValueError, match=message):
        token_boxes(kept(((4, 4),)), size, CASES["siglip"][0]())
    with pytest.raises(ValueError, match=r"^processor: the views of NoneType are unknown, allowed: CL"):
        token_boxes(kept(((4, 4),)), (80, 40), None)


def test_height_and_width_in_the_wrong_order_are_refused_where_images_keep_their_shape():
    processor = Qwen2VLImageProcessorPil(
        size={"shortest_edge": 4 * 64, "longest_edge": 24 * 64}, patch_size=4, merge_size=2
    )
    for size in ((70, 40), (40, 70), (400, 2), (1, 1), (2, 400), (33, 21)):
        image = Image.new("RGB", size)
        (_, rows, columns) = processor([image], return_tensors="pt")["image_grid_thw"][0].tolist()
        shown = kept(((rows // 2, columns // 2),))
        assert len(token_boxes(shown, size, processor)) == shown.of
        if max(size) > 1.5 * min(size):
            with pytest.raises(ValueError, match=f"does not cut an image of {size[1]} x {size[0]} pixels"):
                token_boxes(shown, size[::-1], processor)
