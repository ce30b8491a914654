"""Pixels of tiny models' images in the layout that each family's processor gives them.

A layout is how a family wants its pixels. Shapes: T tiles of an image or of a row.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from atr.features.merged import vision_tower
from atr.features.token_grids import image_arguments, merge_size, patch_side

TINY_IMAGES = ((2, 3), (3, 2), (2, 2), (3, 4))
"""Rows and columns of each image: in language-model tokens where images keep their shape; else only the tiles
of a tiled image follow from them."""


@dataclass(frozen=True)
class TinyImages:
    """What a processor says of the images: the pixel arguments, and the placeholders each image needs.

    `runs` are the lengths of the runs of placeholders of each image; text stands between them.
    """

    pixels: dict[str, Any]
    runs: list[list[int]]


Layout = Callable[[Any, Sequence[Sequence[int]]], TinyImages]


def draw_images(model: Any, rows: Sequence[Sequence[int]]) -> TinyImages:
    """The images of `rows`, one after another; raises ValueError, one line, if no layout is known."""
    try:
        return _layout(model)(model, rows)
    except Exception as error:  # a configuration without what a layout asks, a tower that wants other pixels
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        model_type = model.config.model_type
        raise ValueError(f"model type {model_type!r}: its inputs cannot be made by hand: {reason}") from error


def _layout(model: Any) -> Layout:
    arguments = image_arguments(model)
    for name, layout in _LAYOUTS.items():
        if name in arguments and (name != "image_sizes" or hasattr(model.config, "spatial_merge_size")):
            return layout
    if getattr(model.config, "image_grid_pinpoints", None):
        return _anyres
    if "pixel_values" in arguments:
        return _square
    raise ValueError(
        f"model type {model.config.model_type!r}: no known layout of pixels in {sorted(arguments)}"
    )


def _draw(image: int, *shape: int) -> Tensor:
    """Pixels of an image, which depend on its number and on the shape alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1000 + image))


def _numbers(rows: Sequence[Sequence[int]]) -> list[int]:
    return [image for images in rows for image in images]


def _tiles(model: Any, image: int) -> list[tuple[int, int]]:
    """Rows and columns in tokens of each tile of an image: one, or two tiles beside the whole image."""
    whole = TINY_IMAGES[image]
    if whole[1] != 3:
        return [whole]
    tiles = {"lfm2_vl": [(2, 2), (2, 2), whole], "minicpmv4_6": [whole, (2, 2), (1, 2)]}
    return tiles.get(model.config.model_type, [whole])


def _packed(model: Any, rows: Sequence[Sequence[int]]) -> TinyImages:
    """The patches of all images in one sequence, and a grid of patches per image."""
    images, merge = _numbers(rows), merge_size(model.config)
    grids = [(1, TINY_IMAGES[image][0] * merge, TINY_IMAGES[image][1] * merge) for image in images]
    shape = _patch_shape(model)
    patches = [
        _draw(image, rows * columns, *shape) for image, (_, rows, columns) in zip(images, grids, strict=True)
    ]
    pixels = {"pixel_values": torch.cat(patches), "image_grid_thw": torch.tensor(grids)}
    return TinyImages(pixels, [[rows * columns // merge**2] for _, rows, columns in grids])


def _patch_shape(model: Any) -> tuple[int, ...]:
    """The shape of a patch as the tower's first layer takes it: flat, or (channels, height, width)."""
    first = next(module for module in vision_tower(model).modules() if isinstance(module, _FIRST_LAYERS))
    if isinstance(first, torch.nn.Conv2d):
        return (first.in_channels, *first.kernel_size)
    size = first.in_features if isinstance(first, torch.nn.Linear) else first.weight[0].numel()
    return (size,)


_FIRST_LAYERS = (torch.nn.Conv3d, torch.nn.Conv2d, torch.nn.Linear)


def _square(model: Any, rows: Sequence[Sequence[int]]) -> TinyImages:
    """Square images of one size; a tiled family's images have tiles as many as their columns, and a whole."""
    images, side = _numbers(rows), _side(model.config)
    counts = [TINY_IMAGES[image][1] if model.config.model_type in _TILED else 1 for image in images]
    tiles = [_draw(image, count, 3, side, side) for image, count in zip(images, counts, strict=True)]
    pixels = torch.cat(tiles)
    length = _tokens(model, pixel_values=pixels) // len(pixels)
    is_tagged = model.config.model_type in _TAGGED
    runs = [[length] * count if is_tagged else [length * count] for count in counts]
    return TinyImages({"pixel_values": pixels}, runs)


_TILED = frozenset({"internvl", "aya_vision", "cohere2_vision", "ovis2"})
"""Families whose processors may cut an image into tiles and say of it nothing but the tiles' pixels."""
_TAGGED = frozenset({"aya_vision", "cohere2_vision", "ovis2"})
"""Of these, the ones with text between the tiles of an image."""


def _side(config: Any) -> int:
    size = config.vision_config.image_size
    return int(size[0] if isinstance(size, list | tuple) else size)


@torch.no_grad()
def _tokens(model: Any, **pixels: Any) -> int:
    """Language-model tokens of all images together."""
    pixels["pixel_values"] = pixels["pixel_values"].to(model.dtype)
    output = model.base_model.get_image_features(**pixels, return_dict=True).pooler_output
    parts = [output] if isinstance(output, Tensor) else output
    return sum(part.shape[:-1].numel() for part in parts)


def _anyres(model: Any, rows: Sequence[Sequence[int]]) -> TinyImages:
    """The whole image and tiles of a larger copy, padded to the largest number of tiles; sizes in pixels."""
    images, side = _numbers(rows), _side(model.config)
    sizes = [(TINY_IMAGES[image][0] * side // 2, TINY_IMAGES[image][1] * side // 2) for image in images]
    pinpoints = model.config.image_grid_pinpoints
    counts = [image_size_to_num_patches(size, pinpoints, side) for size in sizes]
    tiles = [
        F.pad(_draw(image, count, 3, side, side), (0,) * 7 + (max(counts) - count,))
        for image, count in zip(images, counts, strict=True)
    ]
    pixels = {"pixel_values": torch.stack(tiles), "image_sizes": torch.tensor(sizes)}
    if "batch_num_images" in image_arguments(model):
        pixels["batch_num_images"] = torch.tensor([len(row) for row in rows])
    with torch.no_grad():
        packed = model.base_model.get_image_features(**pixels, return_dict=True).pooler_output
    return TinyImages(pixels, [[len(features)] for features in packed])


def _row_tiles(model: Any, rows: Sequence[Sequence[int]]) -> TinyImages:
    """The tiles of all images of a row, padded with blank ones to the row with most; tags between tiles."""
    side = _side(model.config)
    tiles = [[_draw(image, TINY_IMAGES[image][1], 3, side, side) for image in images] for images in rows]
    stacked = [torch.cat(row) if row else torch.zeros(0, 3, side, side) for row in tiles]
    most = max(map(len, stacked))
    pixels_BTCHW = torch.stack([F.pad(row, (0,) * 7 + (most - len(row),)) for row in stacked])
    pixels = {"pixel_values": pixels_BTCHW}
    pixels["pixel_attention_mask"] = torch.ones((*pixels_BTCHW.shape[:2], side, side), dtype=torch.int64)
    count = sum(map(len, stacked))
    length = _tokens(model, **pixels) // count
    return TinyImages(pixels, [[length] * TINY_IMAGES[image][1] for images in rows for image in images])


def _padded(model: Any, rows: Sequence[Sequence[int]]) -> TinyImages:
    """Images of their own sizes, padded to the largest; mistral3 breaks the line after each row of tokens."""
    images, unit = _numbers(rows), merge_size(model.config) * patch_side(model.config.vision_config)
    sizes = [(TINY_IMAGES[image][0] * unit, TINY_IMAGES[image][1] * unit) for image in images]
    height, width = (max(side) for side in zip(*sizes, strict=True))
    pixels = [
        F.pad(_draw(image, 3, *size), (0, width - size[1], 0, height - size[0]))
        for image, size in zip(images, sizes, strict=True)
    ]
    breaks = model.config.model_type == "mistral3"
    shapes = [TINY_IMAGES[image] for image in images]
    runs = [[columns] * rows if breaks else [rows * columns] for rows, columns in shapes]
    return TinyImages({"pixel_values": torch.stack(pixels), "image_sizes": torch.tensor(sizes)}, runs)


def _naflex(model: Any, rows: Sequence[Sequence[int]]) -> TinyImages:
    """Flat patches of each tile, padded to the longest, with a mask and the shape in patches."""
    images, merge = _numbers(rows), merge_size(model.config)
    shapes = [[(h * merge, w * merge) for h, w in _tiles(model, image)] for image in images]
    longest, width = (
        max(h * w for tiles in shapes for h, w in tiles),
        3 * patch_side(model.config.vision_config) ** 2,
    )
    patches = [
        F.pad(_draw(image, h * w, width), (0, 0, 0, longest - h * w))
        for image, tiles in zip(images, shapes, strict=True)
        for h, w in tiles
    ]
    flat = torch.tensor([shape for tiles in shapes for shape in tiles])
    mask = torch.arange(longest)[None] < flat.prod(1, keepdim=True)
    pixels = {
        "pixel_values": torch.stack(patches),
        "pixel_attention_mask": mask.long(),
        "spatial_shapes": flat,
    }
    return TinyImages(pixels, [[h * w // merge**2 for h, w in tiles] for tiles in shapes])


def _positioned(model: Any, rows: Sequence[Sequence[int]]) -> TinyImages:
    """Flat patches of each image, padded to the longest, with the (column, row) of each, -1 for padding."""
    images, merge = _numbers(rows), merge_size(model.config)
    shapes = [(TINY_IMAGES[image][0] * merge, TINY_IMAGES[image][1] * merge) for image in images]
    longest, width = max(h * w for h, w in shapes), 3 * patch_side(model.config.vision_config) ** 2
    patches, places = [], []
    for image, (h, w) in zip(images, shapes, strict=True):
        missing = (0, 0, 0, longest - h * w)
        patches.append(F.pad(_draw(image, h * w, width).sigmoid(), missing))
        places.append(
            F.pad(torch.cartesian_prod(torch.arange(h), torch.arange(w)).flip(1), missing, value=-1)
        )
    pixels = {"pixel_values": torch.stack(patches), "image_position_ids": torch.stack(places)}
    return TinyImages(pixels, [[h * w // merge**2] for h, w in shapes])


def _strip(model: Any, rows: Sequence[Sequence[int]]) -> TinyImages:
    """The patches of all tiles side by side in one strip, with the (rows, columns) of each in patches."""
    images, merge, patch = _numbers(rows), merge_size(model.config), patch_side(model.config.vision_config)
    shapes = [[(h * merge, w * merge) for h, w in _tiles(model, image)] for image in images]
    strips = [
        _draw(image, 3, patch, h * w * patch)
        for image, tiles in zip(images, shapes, strict=True)
        for h, w in tiles
    ]
    sizes = torch.tensor([shape for tiles in shapes for shape in tiles])
    pixels = {"pixel_values": torch.cat(strips, -1)[None], "target_sizes": sizes}
    return TinyImages(pixels, [[h * w // merge**2 for h, w in tiles] for tiles in shapes])


_LAYOUTS: Mapping[str, Layout] = {
    "image_grid_thw": _packed,
    "spatial_shapes": _naflex,
    "image_position_ids": _positioned,
    "target_sizes": _strip,
    "pixel_attention_mask": _row_tiles,
    "image_sizes": _padded,
}
"""The layout of families whose `get_image_features` takes an argument of this name; the first that fits."""
