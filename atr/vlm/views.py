"""Which part of an image each grid of visual tokens shows, by the image processor's own geometry.

A processor resizes, crops, pads or tiles an image. Each result is a *view*: a rectangle of the original image
that a grid of tokens divides evenly. A view may reach beyond the image, where the processor pads.
"""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
from transformers.image_transforms import get_resize_output_image_size
from transformers.models.llava_next.modeling_llava_next import unpad_image

from atr.core.ragged import Grid

Rectangle = tuple[float, float, float, float]
"""Left, top, right and bottom in pixels of the original image."""
SHRUNK_FROM = 1.1
"""OneVision shrinks grids whose side is more than so many times its largest."""


@dataclass(frozen=True)
class View:
    """A rectangle of the image that a `grid` of tokens divides evenly, in raster order.

    `row_ends` newlines follow each row of tokens, `ends` newlines the whole view.
    """

    rectangle: Rectangle
    grid: Grid
    row_ends: int = 0
    ends: int = 0


@dataclass(frozen=True)
class Shown:
    """An image of `width` x `height` pixels as a model reads it: the grids of its `tiles`, `tokens` in all.

    Tiles are in the order of the placeholders; newlines are no tokens.
    """

    width: int
    height: int
    tiles: tuple[Grid, ...]
    tokens: int

    @property
    def pixels(self) -> np.ndarray[Any, Any]:
        """An image of this size, channels first, which takes no memory."""
        return np.broadcast_to(np.uint8(0), (1, self.height, self.width))

    @property
    def rectangle(self) -> Rectangle:
        """The whole image."""
        return 0, 0, self.width, self.height

    @property
    def square(self) -> Rectangle:
        """The square around the image, if a processor pads it on two sides."""
        side = max(self.width, self.height)
        left, top = -((side - self.width) // 2), -((side - self.height) // 2)
        return left, top, left + side, top + side

    def cut(self, rows: int, columns: int, tiles: Sequence[Grid]) -> list[View]:
        """Tiles that divide the image evenly, in raster order."""
        wide, high = self.width / columns, self.height / rows
        places = [(row, column) for row in range(rows) for column in range(columns)]
        return [
            View((column * wide, row * high, (column + 1) * wide, (row + 1) * high), grid)
            for (row, column), grid in zip(places, tiles, strict=True)
        ]


def find_views(processor: Any, shown: Shown) -> list[View]:
    """The views of an image in the order of its placeholders.

    Raises ValueError, one line, for an image processor of unknown geometry, and if the processor cuts such an
    image into other tiles.
    """
    kind = type(getattr(processor, "image_processor", processor))
    names = (base.__name__.removesuffix("Pil").removesuffix("Fast") for base in kind.__mro__)
    geometry = next((_GEOMETRIES[name] for name in names if name in _GEOMETRIES), None)
    if geometry is None:
        allowed = ", ".join(sorted(_GEOMETRIES))
        raise ValueError(f"processor: the views of {kind.__name__} are unknown, allowed: {allowed}")
    views = geometry(configured_images(processor), shown)
    if sum(math.prod(view.grid) for view in views) != shown.tokens:
        raise ValueError(
            f"size: {kind.__name__} does not cut an image of {shown.width} x {shown.height} pixels "
            f"into {len(shown.tiles)} tiles of {shown.tokens} tokens, allowed: size of this input's image, "
            "and its processor with the same settings"
        )
    return views


def configured_images(processor: Any) -> Any:
    """A copy of the image processor with the settings that its processor gives it in every call."""
    images = copy(getattr(processor, "image_processor", processor))
    settings: Mapping[str, Any] = getattr(processor, "images_kwargs", None) or {}
    for name, value in settings.items():
        setattr(images, name, value)
    if type(processor).__name__ == "PixtralProcessor":  # it counts the patches of a token as one
        side = processor.patch_size * processor.spatial_merge_size
        images.patch_size = {"height": side, "width": side}
    images.vision_aspect_ratio = getattr(processor, "vision_aspect_ratio", None)
    return images


def _own(images: Any, function: str) -> Callable[..., Any]:
    """A function of the module that defines the image processor."""
    modules = (sys.modules[kind.__module__] for kind in type(images).__mro__)
    found: Callable[..., Any] = next(
        getattr(module, function) for module in modules if hasattr(module, function)
    )
    return found


def _whole(images: Any, shown: Shown) -> list[View]:
    """The image resized, to any aspect ratio."""
    return [View(shown.rectangle, grid) for grid in shown.tiles[:1]]


def _in_proportion(images: Any, shown: Shown) -> list[View]:
    """The image resized in its aspect ratio, up to one token along each side; no view of another ratio."""
    rows, columns = shown.tiles[0]
    is_low = (rows - 1) * shown.width <= (columns + 1) * shown.height
    is_narrow = (columns - 1) * shown.height <= (rows + 1) * shown.width
    return _whole(images, shown) if is_low and is_narrow else []


def _cropped(images: Any, shown: Shown) -> list[View]:
    """The image or its centre, resized."""
    return [View(_centre(images, shown.rectangle), grid) for grid in shown.tiles[:1]]


def _padded(images: Any, shown: Shown) -> list[View]:
    """LLaVA: the image, or the square around it, resized and cropped."""
    rectangle = shown.square if images.do_pad else shown.rectangle
    return [View(_centre(images, rectangle), grid) for grid in shown.tiles[:1]]


def _centre(images: Any, rectangle: Rectangle) -> Rectangle:
    """What is left of a rectangle after resizing and the centre crop."""
    left, top, right, bottom = rectangle
    high, wide = _resized(images, int(bottom - top), int(right - left))
    if not images.do_center_crop:
        return rectangle
    crop_wide, crop_high = images.crop_size["width"], images.crop_size["height"]
    x, y = (right - left) / wide, (bottom - top) / high
    left, top = left + (wide - crop_wide) // 2 * x, top + (high - crop_high) // 2 * y
    return left, top, left + crop_wide * x, top + crop_high * y


def _resized(images: Any, height: int, width: int) -> tuple[int, int]:
    """Height and width after resizing to a shortest edge, or to both edges."""
    if not images.do_resize:
        return height, width
    size = {name: value for name, value in dict(images.size).items() if value is not None}
    if size.keys() == {"height", "width"}:
        return size["height"], size["width"]
    if size.keys() != {"shortest_edge"}:
        name = type(images).__name__
        raise ValueError(f"processor: {name} has size {size}, allowed: shortest_edge, or height and width")
    pixels = np.broadcast_to(np.uint8(0), (1, height, width))
    high, wide = get_resize_output_image_size(
        pixels, size["shortest_edge"], default_to_square=False, input_data_format="channels_first"
    )
    return high, wide


def _padded_to_multiples(images: Any, shown: Shown) -> list[View]:
    """Kimi: the image resized, then padded at the right and at the bottom."""
    resized, padded = _own(images, "navit_resize")(
        shown.height,
        shown.width,
        patch_size=images.patch_size,
        merge_kernel_size=images.merge_size,
        max_patches=images.max_patches,
        max_size_per_side=images.size["max_height"],
    )
    high, wide = (
        of * after / before
        for of, after, before in zip((shown.height, shown.width), padded, resized, strict=True)
    )
    return [View((0, 0, wide, high), grid) for grid in shown.tiles[:1]]


def _pan_and_scan(images: Any, shown: Shown) -> list[View]:
    """Gemma 3: the image squeezed; its crops, if it makes any, are images of their own."""
    if images.do_pan_and_scan:
        raise ValueError("processor: crops of pan and scan have no views, allowed: do_pan_and_scan=False")
    return _whole(images, shown)


def _anyres(images: Any, shown: Shown) -> list[View]:
    """LLaVA-NeXT and OneVision: the whole image, then its larger copy without the padding of its tiles."""
    base, *cut = shown.tiles
    if not cut:  # one of several images of a sample
        return [View(shown.square, base, ends=1)]
    canvas = select_best_resolution((shown.height, shown.width), images.image_grid_pinpoints)
    crop = images.crop_size if images.do_center_crop else images.size
    side = crop.get("height") or crop["shortest_edge"]
    grid = (canvas[0] // side * base[0], canvas[1] // side * base[1])
    return [View(shown.rectangle, base), _unpadded(images, shown, canvas, grid)]


def _unpadded(images: Any, shown: Shown, canvas: Grid, grid: Grid) -> View:
    """The tokens of a `canvas`, height and width in pixels, that are left when the model removes padding."""
    place_RC = unpad_image(torch.arange(math.prod(grid)).view(1, *grid), (shown.height, shown.width))[0]
    first, last = (divmod(int(place), grid[1]) for place in (place_RC[0, 0], place_RC[-1, -1]))
    resized = get_patch_output_size(shown.pixels, canvas, input_data_format="channels_first")
    spans = []
    for axis, length in enumerate((shown.height, shown.width)):
        token, padding = canvas[axis] / grid[axis], (canvas[axis] - resized[axis]) // 2
        edges = (first[axis] * token, (last[axis] + 1) * token)
        spans.append([(edge - padding) * length / resized[axis] for edge in edges])
    (top, bottom), (left, right) = spans
    return View((left, top, right, bottom), _shrunk(images, shown, tuple(place_RC.shape)), row_ends=1)


def _shrunk(images: Any, shown: Shown, grid: Grid) -> Grid:
    """The grid after OneVision's downsampling, if the image has fewer tokens than `grid` and tile 0."""
    base = math.prod(shown.tiles[0])
    if images.vision_aspect_ratio is None or base + math.prod(grid) == shown.tokens:
        return grid
    most = int(images.vision_aspect_ratio.removeprefix("anyres_max_")) * shown.tiles[0][0] ** 2
    ratio = math.sqrt(math.prod(grid) / most)
    return (int(grid[0] // ratio), int(grid[1] // ratio)) if ratio > SHRUNK_FROM else grid


def _thumbnail_last(images: Any, shown: Shown) -> list[View]:
    """InternVL, Aya, GOT-OCR, Command A: tiles, then the whole image; an image of one tile is whole."""
    *tiles, last = shown.tiles
    if not tiles:
        return _whole(images, shown)
    size = (images.size["height"], images.size["width"])
    columns, rows = _own(images, "get_optimal_tiled_canvas")(
        (shown.height, shown.width), size, images.min_patches, images.max_patches
    )
    return _tiled(shown, rows, columns, tiles, last=last)


def _thumbnail_first(images: Any, shown: Shown) -> list[View]:
    """Ovis 2: the whole image, then tiles."""
    first, *tiles = shown.tiles
    if not tiles:
        return _cropped(images, shown)
    size, high, wide = (shown.height, shown.width), images.size["height"], images.size["width"]
    if images.use_covering_area_grid:
        columns, rows = _own(images, "get_min_tile_covering_grid")(
            size, target_patch_size=high, max_image_tiles=images.max_patches
        )
    else:
        columns, rows = _own(images, "get_optimal_tiled_canvas")(
            size, (high, wide), images.min_patches, images.max_patches
        )
    return _tiled(shown, rows, columns, tiles, first=first)


def _slices(images: Any, shown: Shown) -> list[View]:
    """MiniCPM-V: the whole image, then slices."""
    first, *tiles = shown.tiles
    if not tiles:
        return _whole(images, shown)
    size = (shown.height, shown.width)
    rows, columns = images.get_sliced_grid(size, images.max_slice_nums, images.scale_resolution) or (0, 0)
    return _tiled(shown, rows, columns, tiles, first=first)


def _lfm2_tiles(images: Any, shown: Shown) -> list[View]:
    """LFM2-VL: tiles, then the whole image, if the processor adds it."""
    if len(shown.tiles) == 1:
        return _whole(images, shown)
    columns, rows, *_ = images._get_grid_layout(
        shown.height, shown.width, images.min_tiles, images.max_tiles, images.tile_size
    )
    tiles = shown.tiles[:-1] if images.use_thumbnail else shown.tiles
    return _tiled(shown, rows, columns, tiles, last=shown.tiles[-1] if images.use_thumbnail else None)


def _idefics3_tiles(images: Any, shown: Shown) -> list[View]:
    """Idefics 3 and SmolVLM: tiles, then the whole image; an image of one tile is whole."""
    *tiles, last = shown.tiles
    if not tiles:
        return _whole(images, shown)
    side, height, width = images.max_image_size["longest_edge"], shown.height, shown.width
    if images.do_resize:
        height, width = _own(images, "get_resize_output_image_size")(
            shown.pixels, images.size["longest_edge"]
        )
    if width >= height:
        columns = math.ceil(width / side)
        rows = math.ceil(int(columns * side / (width / height)) / side)
    else:
        rows = math.ceil(height / side)
        columns = math.ceil(int(rows * side * (width / height)) / side)
    return _tiled(shown, rows, columns, tiles, last=last)


def _tiled(
    shown: Shown,
    rows: int,
    columns: int,
    tiles: Sequence[Grid],
    first: Grid | None = None,
    last: Grid | None = None,
) -> list[View]:
    """Tiles with the whole image before or behind them; no view if the image has another number of tiles."""
    if len(tiles) != rows * columns:
        return []
    before, behind = ([View(shown.rectangle, grid)] if grid else [] for grid in (first, last))
    return [*before, *shown.cut(rows, columns, tiles), *behind]


_GEOMETRIES: dict[str, Callable[[Any, Shown], list[View]]] = {
    "CLIPImageProcessor": _cropped,
    "Cohere2VisionImageProcessor": _thumbnail_last,
    "Ernie4_5_VLMoeImageProcessor": _in_proportion,
    "Gemma3ImageProcessor": _pan_and_scan,
    "Gemma4ImageProcessor": _in_proportion,
    "Gemma4UnifiedImageProcessor": _in_proportion,
    "Glm46VImageProcessor": _in_proportion,
    "Glm4vImageProcessor": _in_proportion,
    "GotOcr2ImageProcessor": _thumbnail_last,
    "Idefics3ImageProcessor": _idefics3_tiles,
    "Kimi_K25ImageProcessor": _padded_to_multiples,
    "Lfm2VlImageProcessor": _lfm2_tiles,
    "LlavaImageProcessor": _padded,
    "LlavaNextImageProcessor": _anyres,
    "LlavaOnevisionImageProcessor": _anyres,
    "MiniCPMV4_6ImageProcessor": _slices,
    "Ovis2ImageProcessor": _thumbnail_first,
    "PaddleOCRVLImageProcessor": _in_proportion,
    "PixtralImageProcessor": _in_proportion,
    "Qwen2VLImageProcessor": _in_proportion,
    "SiglipImageProcessor": _cropped,
    "SmolVLMImageProcessor": _idefics3_tiles,
    "ViTImageProcessor": _cropped,
}
