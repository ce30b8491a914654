"""The grid of each tile in tokens of the language model, and the tiles of each image.

Both are found before the tower runs, from the model's configuration, the processor's sizes and the runs of
placeholders in the text. Shapes: B rows, L tokens of a row.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from math import isqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from atr.core.ragged import Grid
from atr.vlm.families.pixel_checks import check_tiles, read_sizes


@dataclass(frozen=True)
class PlaceholderRun:
    """Placeholders side by side: their `row` and number, and the tokens `before` and `after` (-1: none)."""

    row: int
    length: int
    before: int
    after: int


Grids = Callable[[Any, Mapping[str, Tensor], Sequence[PlaceholderRun]], list[Grid]]
Images = Callable[[Sequence[PlaceholderRun], Sequence[Grid]], list[int]]


def find_runs(ids_BL: Tensor, placeholder_BL: Tensor) -> list[PlaceholderRun]:
    """The runs of placeholders of all rows, in order."""
    starts_BL, ends_BL = placeholder_BL.clone(), placeholder_BL.clone()
    starts_BL[:, 1:] &= ~placeholder_BL[:, :-1]
    ends_BL[:, :-1] &= ~placeholder_BL[:, 1:]
    bordered_BL = F.pad(ids_BL, (1, 1), value=-1)
    runs = []
    for (row, start), (_, end) in zip(starts_BL.nonzero().tolist(), ends_BL.nonzero().tolist(), strict=True):
        before, after = int(bordered_BL[row, start]), int(bordered_BL[row, end + 2])
        runs.append(PlaceholderRun(row, end + 1 - start, before, after))
    return runs


def native_grids(model: Any, inputs: Mapping[str, Tensor], runs: Sequence[PlaceholderRun]) -> list[Grid]:
    """The grids that the processor's sizes say, whichever it gives; without sizes, tiles are square."""
    known = set(signature(model.base_model.get_image_features).parameters) - {"kwargs"}
    for key, find in _BY_SIZES.items():
        if key in known:
            return find(model, inputs)
    return square_grids(inputs["pixel_values"], runs)


def packed_grids(model: Any, inputs: Mapping[str, Tensor]) -> list[Grid]:
    """Towers of packed patches: `image_grid_thw` (time, rows, columns) over the merge size."""
    sizes = _merged(read_sizes(inputs, "image_grid_thw"), merge_size(model))
    return [(rows, columns) for _, rows, columns in sizes]


def shaped_grids(model: Any, inputs: Mapping[str, Tensor]) -> list[Grid]:
    """Padded patches of each tile: `spatial_shapes` (rows, columns) over the merge size."""
    return _merged(read_sizes(inputs, "spatial_shapes"), merge_size(model))


def strip_grids(model: Any, inputs: Mapping[str, Tensor]) -> list[Grid]:
    """Patches of all tiles in one strip: `target_sizes` (rows, columns) over both merges of MiniCPM-V 4.6."""
    config = model.config
    in_tower = 1 if config.downsample_mode == "4x" else 2
    sizes = _merged(read_sizes(inputs, "target_sizes"), in_tower)
    return _merged(torch.tensor(sizes), merge_size(model) ** config.merger_times)


def placed_grids(model: Any, inputs: Mapping[str, Tensor]) -> list[Grid]:
    """Patches with their (column, row), -1 for padding: the largest of each over the merge size."""
    places_BNX = read_sizes(inputs, "image_position_ids")
    return _merged(places_BNX.amax(1).flip(-1) + 1, merge_size(model))


def sized_grids(model: Any, inputs: Mapping[str, Tensor]) -> list[Grid]:
    """Images of their own size: `image_sizes` in pixels over patch and merge size."""
    check_tiles(inputs["pixel_values"])
    return _merged(
        read_sizes(inputs, "image_sizes"), model.config.vision_config.patch_size * merge_size(model)
    )


_BY_SIZES = {
    "image_grid_thw": packed_grids,
    "spatial_shapes": shaped_grids,
    "target_sizes": strip_grids,
    "image_position_ids": placed_grids,
    "image_sizes": sized_grids,
}
"""By the argument of `get_image_features` that says the sizes of tiles."""


def merge_size(model: Any) -> int:
    """Patches along a side of a token; raises ValueError if the configuration does not say it."""
    for config in (model.config.vision_config, model.config):
        for name in ("spatial_merge_size", "merge_kernel_size", "pooling_kernel_size", "downsample_factor"):
            if value := getattr(config, name, None):
                sides = value if isinstance(value, list | tuple) else [value]
                return int(sides[0])
    raise ValueError(
        f"model type {model.config.model_type!r}: its config does not say how patches are merged"
    )


def _merged(sizes: Any, side: int) -> list[Any]:
    shapes = [tuple(shape) for shape in torch.as_tensor(sizes).tolist()]
    for image, shape in enumerate(shapes):
        if min(shape[-2:]) < side:
            raise ValueError(
                f"inputs: image or tile {image} is {shape[-2:]}, less than one token of {(side, side)}"
            )
    return [tuple(size // side for size in shape) for shape in shapes]


def square_grids(pixels: Tensor, runs: Sequence[PlaceholderRun]) -> list[Grid]:
    """Tiles of one square grid, as many as the pixels have: all placeholders are shared by them."""
    check_tiles(pixels)
    placeholders = sum(run.length for run in runs)
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


def until_tag(runs: Sequence[PlaceholderRun], grids: Sequence[Grid]) -> list[int]:
    """An image ends with the run whose tag is that of its row's last run: the tile of the whole image."""
    last = {run.row: run.before for run in runs}
    return _group(runs, grids, [run.before == last[run.row] for run in runs])


def until_end(runs: Sequence[PlaceholderRun], grids: Sequence[Grid]) -> list[int]:
    """An image ends with the run that the token after its row's last run follows: the end of an image."""
    last = {run.row: run.after for run in runs}
    return _group(runs, grids, [run.after == last[run.row] for run in runs])


def from_start(runs: Sequence[PlaceholderRun], grids: Sequence[Grid]) -> list[int]:
    """An image begins with the run that has the token before its row's first run: the start of an image."""
    first: dict[int, int] = {}
    starts = [run.before == first.setdefault(run.row, run.before) for run in runs]
    return _group(runs, grids, [*starts[1:], True])


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
