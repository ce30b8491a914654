"""The grid of each tile in tokens of the language model, and the tiles of each image.

Both are found before the tower runs, from the model's configuration, the processor's sizes and the runs of
placeholders in the text. Shapes: B rows, L tokens of a row.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Any

import torch
from torch import Tensor

Grid = tuple[int, int]
"""Rows and columns of tokens."""


@dataclass(frozen=True)
class PlaceholderRun:
    """Placeholders side by side: their `row`, their number, and the ids of the tokens in front (-1: none)."""

    row: int
    length: int
    tag: int


Grids = Callable[[Any, Mapping[str, Tensor], Sequence[PlaceholderRun]], list[Grid]]
Images = Callable[[Sequence[PlaceholderRun], Sequence[Grid]], list[int]]


def find_runs(ids_BL: Tensor, placeholder_BL: Tensor) -> list[PlaceholderRun]:
    """The runs of placeholders of all rows, in order."""
    starts_BL = placeholder_BL.clone()
    starts_BL[:, 1:] &= ~placeholder_BL[:, :-1]
    run_P = starts_BL.flatten().cumsum(0)[placeholder_BL.flatten()] - 1
    lengths = torch.bincount(run_P).tolist()
    return [
        PlaceholderRun(row, length, int(ids_BL[row, column - 1]) if column else -1)
        for (row, column), length in zip(starts_BL.nonzero().tolist(), lengths, strict=True)
    ]


def packed_grids(model: Any, inputs: Mapping[str, Tensor], runs: Sequence[PlaceholderRun]) -> list[Grid]:
    """Towers of packed patches: `image_grid_thw` over the merge size."""
    merge = model.config.vision_config.spatial_merge_size
    grids = torch.as_tensor(_require(inputs, "image_grid_thw")).tolist()
    return [(rows // merge, columns // merge) for _, rows, columns in grids]


def sized_grids(model: Any, inputs: Mapping[str, Tensor], runs: Sequence[PlaceholderRun]) -> list[Grid]:
    """Images of their own size: `image_sizes` in pixels over patch and merge size."""
    side = model.config.vision_config.patch_size * model.config.spatial_merge_size
    return [
        (height // side, width // side)
        for height, width in torch.as_tensor(_require(inputs, "image_sizes")).tolist()
    ]


def square_grids(model: Any, inputs: Mapping[str, Tensor], runs: Sequence[PlaceholderRun]) -> list[Grid]:
    """Tiles of one square grid, as many as the pixels have: all placeholders are shared by them."""
    pixels, placeholders = inputs["pixel_values"], sum(run.length for run in runs)
    tiles = _count_tiles(pixels)
    side = isqrt(placeholders // tiles) if tiles else 0
    if tiles * side**2 != placeholders:
        raise ValueError(
            f"input_ids: {placeholders} image placeholders for {tiles} tiles of pixel_values, which all have "
            "one square grid; a placeholder typed in a text counts as well"
        )
    return [(side, side)] * tiles


def run_per_image(runs: Sequence[PlaceholderRun], grids: Sequence[Grid]) -> list[int]:
    """Each run of placeholders is an image, or several whole ones."""
    return _group(runs, grids, [True] * len(runs))


def last_tag(runs: Sequence[PlaceholderRun], grids: Sequence[Grid]) -> list[int]:
    """An image ends with the run that has the tag of its row's last run: the tile of the whole image."""
    last = {run.row: run.tag for run in runs}
    return _group(runs, grids, [run.tag == last[run.row] for run in runs])


def _group(runs: Sequence[PlaceholderRun], grids: Sequence[Grid], ends: Sequence[bool]) -> list[int]:
    """Tiles of each image, whose last run `ends` marks; a run and a tile end together at each image's end."""
    counts, tile, count, left = [], 0, 0, 0
    for run, is_end in zip(runs, ends, strict=True):
        left += run.length
        while left > 0 and tile < len(grids):
            left -= grids[tile][0] * grids[tile][1]
            tile, count = tile + 1, count + 1
        if is_end and left == 0:
            counts.append(count)
            count = 0
    if left or count or tile < len(grids):
        tokens = sum(rows * columns for rows, columns in grids)
        raise ValueError(
            f"input_ids: {sum(run.length for run in runs)} image placeholders for {tokens} tokens of "
            f"{len(grids)} tiles; a placeholder typed in a text counts as well"
        )
    return counts


def _count_tiles(pixels: Tensor) -> int:
    """Tiles of pixels (tiles, ...) or (rows, tiles, ...), where tiles of nothing but zeros are padding."""
    if pixels.ndim < 5:
        return len(pixels)
    return int((pixels != 0).flatten(2).any(-1).sum())


def _require(inputs: Mapping[str, Tensor], key: str) -> Tensor:
    if key not in inputs:
        raise ValueError(f"inputs: {key} is missing, needed with pixel_values")
    return inputs[key]
