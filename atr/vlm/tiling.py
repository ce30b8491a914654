"""Maps per-tile tokens to the packed sequence the language model reads, and back.

Features, scores and marks are all packed by the model family, so that the mapping is defined in one place.
Shapes: B tiles, N tokens of a tile, C channels, T tiles of an image, P packed tokens of an image.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from atr.core.ragged import Grid
from atr.vlm.encoded_tiles import EncodedTiles
from atr.vlm.families import Tiling, family_of
from atr.vlm.families.rule import Rule
from atr.vlm.image_tokens import ImageTokens

ROW_END = -1
"""Marks a newline token, which belongs to no tile."""


@dataclass(frozen=True)
class TileLayout:
    """How a batch of images is packed; `resample=False` skips OneVision's downsampling of large images."""

    model: Any
    tiling: Tiling
    resample: bool = True

    def tokens(self, encoded: EncodedTiles) -> ImageTokens:
        """All tokens of each image as the language model reads them."""
        return family_of(self.model).tokens(self.model, self.tiling, encoded, self.resample)

    def values(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Values of the packed tokens of each image, (P, C) each, of (N, C) per tile; zero for newlines."""
        return self._pack(values, values[0].new_zeros(values[0].shape[-1]))

    @cached_property
    def tile_of(self) -> list[Tensor]:
        """The tile of each packed token, ROW_END for a newline; int64 (P,) per image, on the CPU.

        A token resampled from several tiles belongs to the one with the largest weight.
        """
        most = max(self.tiling.tiles)
        tile_B = torch.cat([torch.arange(tiles) for tiles in self.tiling.tiles])
        mark_BT = F.one_hot(tile_B, most + 1).float()
        newline_T = F.one_hot(torch.tensor(most), most + 1).float()
        marks = [
            mark_T.expand(rows * columns, -1)
            for mark_T, (rows, columns) in zip(mark_BT, self.tiling.grids, strict=True)
        ]
        packed = self._pack(marks, newline_T)
        return [mark_PT.argmax(-1).where(mark_PT[:, -1] == 0, ROW_END) for mark_PT in packed]

    @cached_property
    def grids(self) -> list[tuple[Grid, ...]]:
        """The grids of the tiles of each image."""
        return [self.tiling.grids[first:after] for first, after in pairwise(self.tiling.firsts)]

    @cached_property
    def lengths(self) -> list[int]:
        """Packed tokens of each image, newlines included."""
        return [len(tile_P) for tile_P in self.tile_of]

    @cached_property
    def sizes(self) -> list[int]:
        """Visual tokens of each image: packed tokens without newlines."""
        return [int((tile_P != ROW_END).sum()) for tile_P in self.tile_of]

    def in_whole_image(self, kept: list[Tensor]) -> list[tuple[Tensor, Grid]]:
        """The kept indices that lie in the tile of the whole image, in its raster order, and its grid.

        That is an image's first tile, or the last one, as its family has it.
        """
        family = family_of(self.model)
        whole = family.entry.whole if isinstance(family, Rule) else 0
        found = []
        for kept_K, tile_P, grids in zip(kept, self.tile_of, self.grids, strict=True):
            inside_P = tile_P == range(len(grids))[whole]
            place_P = inside_P.cumsum(0) - 1
            found.append((place_P[kept_K[inside_P[kept_K]]], grids[whole]))
        return found

    def groups(self, budget: str) -> list[list[Tensor]]:
        """Indices of the packed tokens that share a budget, without newlines.

        For each image one group if `budget` is "image", one group per tile if it is "tile".
        """
        if budget == "image":
            return [[_indices(tile_P != ROW_END)] for tile_P in self.tile_of]
        return [
            [_indices(tile_P == tile) for tile in range(tiles)]
            for tile_P, tiles in zip(self.tile_of, self.tiling.tiles, strict=True)
        ]

    def with_newlines(self, kept: list[Tensor], newline: str) -> list[Tensor]:
        """The kept indices plus newlines: all ("keep"), or those of rows with kept tokens ("follow")."""
        stay = []
        for tile_P, kept_K, tiles in zip(self.tile_of, kept, self.tiling.tiles, strict=True):
            end_P = tile_P == ROW_END
            row_P = end_P.cumsum(0) - end_P.long()  # a newline belongs to the row that it ends
            in_rows_K = kept_K[tile_P[kept_K] > 0] if tiles > 1 else kept_K  # tile 0 of several has no rows
            used_P = torch.isin(row_P, row_P[in_rows_K]) if newline == "follow" else torch.ones_like(end_P)
            stay.append(torch.cat([kept_K, _indices(end_P & used_P)]).sort().values)
        return stay

    def _pack(self, values: Sequence[Tensor], newline_C: Tensor) -> list[Tensor]:
        return family_of(self.model).pack(self.model, self.tiling, values, newline_C, self.resample)


def _indices(mask_P: Tensor) -> Tensor:
    return mask_P.nonzero()[:, 0]
