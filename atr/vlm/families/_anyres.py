"""AnyRes tiling of LLaVA-NeXT and LLaVA-OneVision: the image as a whole, then the tiles of a larger copy."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import (
    get_anyres_image_grid_shape,
    image_size_to_num_patches,
)

from atr.vlm.families.base import Tiling
from atr.vlm.families.tower import token_grid


def image_sizes(inputs: Mapping[str, Tensor]) -> Any:
    """The (height, width) of each image in pixels; raises ValueError if the inputs lack them."""
    if "image_sizes" not in inputs:
        raise ValueError("inputs: image_sizes is missing, needed with pixel_values")
    if (shape := tuple(torch.as_tensor(inputs["image_sizes"]).shape))[1:] != (2,):
        raise ValueError(f"inputs: image_sizes is {shape}, allowed: (images, 2)")
    return inputs["image_sizes"]


def anyres_tiling(model: Any, inputs: Mapping[str, Tensor], is_cut: Sequence[bool]) -> Tiling:
    """The tiling by the model's own count of tiles; `is_cut` says which images are cut.

    Raises ValueError if the pixels have another size or too few tiles.
    """
    side, pinpoints = model.config.vision_config.image_size, model.config.image_grid_pinpoints
    pixels, sizes = inputs["pixel_values"], torch.as_tensor(image_sizes(inputs)).tolist()
    if len(sizes) != len(is_cut):
        raise ValueError(f"batch_num_images: {len(is_cut)} images, image_sizes has {len(sizes)}")
    if tuple(pixels.shape[-2:]) != (side, side):
        raise ValueError(f"pixel_values: tiles of {tuple(pixels.shape[-2:])} pixels, the model reads {side}")
    tiles = tuple(
        image_size_to_num_patches(size, pinpoints, side) if cut else 1
        for size, cut in zip(sizes, is_cut, strict=True)
    )
    _check_tiles(pixels, tiles)
    arrangements = tuple(
        get_anyres_image_grid_shape(size, pinpoints, side) if cut else (0, 0)
        for size, cut in zip(sizes, is_cut, strict=True)
    )
    return Tiling.of_one_grid(tiles, token_grid(model, pixels), sizes, arrangements)


def _check_tiles(pixels: Tensor, tiles: Sequence[int]) -> None:
    """Raise ValueError if pixels (images, tiles, ...) or (tiles, ...) have fewer tiles than the images."""
    is_padded = pixels.ndim == 5
    given = [pixels.shape[1]] * len(pixels) if is_padded else [len(pixels)]
    needed = list(tiles) if is_padded else [sum(tiles)]
    if len(given) != len(needed) or any(have < need for have, need in zip(given, needed, strict=True)):
        raise ValueError(f"pixel_values: {given} tiles, image_sizes and image_grid_pinpoints need {needed}")
