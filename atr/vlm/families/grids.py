"""The grid of each tile in tokens of the language model, and the tiles of each image.

Both are found before the tower runs, from the model's configuration, the processor's sizes and the runs of
placeholders in the text. Shapes: B rows, L tokens of a row.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from atr.core.ragged import Grid
from atr.features.token_grids import block_grids, count_tiles, merge_size, size_argument
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
    if key := size_argument(model):
        if key == "image_sizes":
            check_tiles(inputs["pixel_values"])
        read_sizes(inputs, key)
        return block_grids(model, inputs, merge_size(model.config))
    return square_grids(inputs["pixel_values"], runs)


def square_grids(pixels: Tensor, runs: Sequence[PlaceholderRun]) -> list[Grid]:
    """Tiles of one square grid, as many as the pixels have: all placeholders are shared by them."""
    check_tiles(pixels)
    placeholders = sum(run.length for run in runs)
    tiles = count_tiles(pixels)
    side = isqrt(placeholders // tiles)
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
