"""The grid of patches and of tokens of each image or tile, from what its image processor says of its size.

A token, as the language model is fed it, is a square block of patches of the vision tower. Shapes: see
atr.core.tokens; B images or tiles.
"""

from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any

from torch import Tensor

from atr.core.ragged import Grid

Inputs = Mapping[str, Any]
"""What an image processor gives."""


def image_arguments(model: Any) -> frozenset[str]:
    """The names of what the model's `get_image_features` takes."""
    return frozenset(signature(model.base_model.get_image_features).parameters) - {"kwargs"}


def size_argument(model: Any) -> str:
    """The argument that says the size of each image or tile; empty if all have the size of the pixels."""
    return next((name for name in _PATCHES if name in image_arguments(model)), "")


def patch_grids(model: Any, inputs: Inputs) -> list[Grid]:
    """(rows, columns) of the patches of each image or tile, without padding, in the order of the pixels.

    Raises ValueError if the inputs lack the size argument.
    """
    name = size_argument(model)
    if not name:
        return _of_pixels(model.config, inputs)
    if name not in inputs:
        raise ValueError(f"inputs: {name} is missing, needed with pixel_values")
    return [(int(rows), int(columns)) for rows, columns in _PATCHES[name](model.config, inputs)]


def block_grids(model: Any, inputs: Inputs, block: int) -> list[Grid]:
    """(rows, columns) of the tokens of `block` x `block` patches; patches beyond whole blocks do not count.

    Raises ValueError as `patch_grids` does, and for an image or tile of less than one token.
    """
    grids = patch_grids(model, inputs)
    for image, grid in enumerate(grids):
        if min(grid) < block:
            raise ValueError(
                f"inputs: image or tile {image} is {grid} patches, less than one token of {(block, block)}"
            )
    return [(rows // block, columns // block) for rows, columns in grids]


def count_tiles(pixels: Tensor) -> int:
    """Tiles of pixels (tiles, ...) or (rows, tiles, ...), where tiles of nothing but zeros are padding."""
    return len(pixels) if pixels.ndim < 5 else len(real_tiles(pixels))


def real_tiles(pixels: Tensor) -> Tensor:
    """Tiles (tiles, ...) of pixels (rows, tiles, ...), without those that pad a row of images with zeros.

    If there are only zeros, the first one, as Idefics 3 and SmolVLM take it.
    """
    tiles = pixels.flatten(0, 1)
    is_real = tiles.flatten(1).any(-1)
    return tiles[is_real] if is_real.any() else tiles[:1]


def merge_size(config: Any) -> int:
    """Patches along a side of a token; raises ValueError if the model's configuration does not say it."""
    for part in (config.vision_config, config):
        for name in ("spatial_merge_size", "merge_kernel_size", "pooling_kernel_size", "downsample_factor"):
            if value := getattr(part, name, None):
                # MiniCPM-V merges several times, and in its tower once more.
                side: int = _side(value) ** getattr(config, "merger_times", 1)
                return side * _merged_in_tower(config)
    raise ValueError(f"model type {config.model_type!r}: its config does not say how patches are merged")


def patch_side(vision: Any) -> int:
    """Side of a patch in pixels, from a tower's configuration."""
    return _side(vision.patch_size)


def _side(size: Any) -> int:
    return int(size[0] if isinstance(size, list | tuple) else size)


def _merged_in_tower(config: Any) -> int:
    return 2 if getattr(config, "downsample_mode", "4x") != "4x" else 1


def _of_pixels(config: Any, inputs: Inputs) -> list[Grid]:
    """Tiles of one size, that of the pixels."""
    pixels, side = inputs["pixel_values"], patch_side(config.vision_config)
    return [(pixels.shape[-2] // side, pixels.shape[-1] // side)] * count_tiles(pixels)


def _of_thw(config: Any, inputs: Inputs) -> list[list[int]]:
    """Patches of all images in one sequence: (time, rows, columns)."""
    return [sizes[1:] for sizes in inputs["image_grid_thw"].tolist()]


def _of_positions(config: Any, inputs: Inputs) -> list[list[int]]:
    """Patches with their (column, row), -1 for padding: one more than the largest of each."""
    grids: list[list[int]] = (inputs["image_position_ids"].amax(1).flip(-1) + 1).tolist()
    return grids


def _of_sizes(config: Any, inputs: Inputs) -> list[list[int]]:
    """Images of their own (height, width) in pixels, padded to the largest."""
    side = patch_side(config.vision_config)
    return [[int(height) // side, int(width) // side] for height, width in inputs["image_sizes"]]


_PATCHES: dict[str, Callable[[Any, Inputs], list[list[int]]]] = {
    "image_grid_thw": _of_thw,
    "spatial_shapes": lambda config, inputs: inputs["spatial_shapes"].tolist(),
    "target_sizes": lambda config, inputs: inputs["target_sizes"].tolist(),
    "image_position_ids": _of_positions,
    "image_sizes": _of_sizes,
}
"""Rows and columns of patches, by the argument of `get_image_features` that says them."""
