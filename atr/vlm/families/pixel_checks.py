"""Checks that the pixels of a processed input are those whose sizes stand beside them, before the tower runs.

Towers cut the pixels by the sizes: others raise an error inside of the tower, or are broadcast to features of
another image without a word.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

Shape = tuple[int, ...]


def read_sizes(inputs: Mapping[str, Any], key: str, pixels_key: str = "pixel_values") -> Tensor:
    """The sizes of all images or tiles, if the pixels fit them; raises ValueError that names both."""
    axes = _AXES.get(key, "(images or tiles, sizes)")
    if key not in inputs:
        raise ValueError(f"inputs: {key} is missing, needed with {pixels_key}")
    sizes, pixels = inputs[key], inputs[pixels_key]
    if not isinstance(sizes, Tensor):
        kind = type(sizes).__name__
        raise ValueError(f"inputs: {key} is a {kind}, allowed: a tensor {axes}")
    if sizes.ndim != axes.count(",") + 1:
        raise ValueError(f"inputs: {key} is {tuple(sizes.shape)}, allowed: {axes}")
    needed, given = _NEEDED[key](sizes, pixels)
    if given != needed:
        raise ValueError(
            f"inputs: {pixels_key} is {tuple(pixels.shape)}, {_line(given)} where {key} "
            f"{tuple(sizes.shape)} needs {_line(needed)}"
        )
    return sizes


def check_tiles(pixels: Tensor) -> None:
    """Raise ValueError for pixels without an axis of tiles."""
    if pixels.ndim < 4:
        raise ValueError(
            f"inputs: pixel_values is {tuple(pixels.shape)}, allowed: (tiles, channels, rows, columns)"
        )


def _line(shape: Shape) -> str:
    return " x ".join(map(str, shape))


_AXES = {"image_position_ids": "(images, patches, 2)"}


def _patches(sizes: Tensor, pixels: Tensor) -> tuple[Shape, Shape]:
    """The patches of all images one after another."""
    return (int(sizes.prod(-1).sum()),), tuple(pixels.shape[:1])


def _tiles(sizes: Tensor, pixels: Tensor) -> tuple[Shape, Shape]:
    """One entry for each image or tile."""
    return (len(sizes),), tuple(pixels.shape[:1])


def _places(sizes: Tensor, pixels: Tensor) -> tuple[Shape, Shape]:
    """A place for each patch of each image."""
    return tuple(sizes.shape[:2]), tuple(pixels.shape[:2])


def _strip(sizes: Tensor, pixels: Tensor) -> tuple[Shape, Shape]:
    """The patches of all tiles side by side, each as wide as high."""
    return (int(sizes.prod(-1).sum()) * pixels.shape[-2],), tuple(pixels.shape[-1:])


_NEEDED: dict[str, Callable[[Tensor, Tensor], tuple[Shape, Shape]]] = {
    "image_grid_thw": _patches,
    "spatial_shapes": _tiles,
    "target_sizes": _strip,
    "image_position_ids": _places,
    "image_sizes": _tiles,
    "video_grid_thw": _patches,
}
"""By the argument that says the sizes: the part of the shape that they need, and that of the pixels."""
