"""Maps per-tile tokens to the packed sequence the language model reads, and back.

Features, scores and marks are all packed by the model family, so that the mapping is defined in one place.
Shapes: B tiles, N tokens of a tile, C channels, T tiles of an image, P packed tokens of an image.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from atr.reduction import EncoderOutput
from atr.vlm.families import Tiling, family_of

ROW_END = -1
"""Marks a newline token, which belongs to no tile."""


@dataclass(frozen=True)
class TileLayout:
    """How a batch of images is packed; `resample=False` skips OneVision's downsampling of large images."""

    model: Any
    tiling: Tiling
    resample: bool = True

    def tokens(self, encoded: EncoderOutput) -> list[Tensor]:
        """All tokens of each image as the language model reads them, (P, D) each."""
        assert encoded.projected_BND is not None, "encoded for a language model"
        return self._pack(encoded.projected_BND, None)

    def values(self, values_BNC: Tensor) -> list[Tensor]:
        """Values of the packed tokens of each image, (P, C) each; zero for newlines."""
        return self._pack(values_BNC, values_BNC.new_zeros(values_BNC.shape[-1]))

    @cached_property
    def tile_of(self) -> list[Tensor]:
        """The tile of each packed token, ROW_END for a newline; int64 (P,) per image, on the CPU.

        A token resampled from several tiles belongs to the one with the largest weight.
        """
        most = max(self.tiling.tiles)
        tile_B = torch.cat([torch.arange(tiles) for tiles in self.tiling.tiles])
        mark_BT = F.one_hot(tile_B, most + 1).float()
        newline_T = F.one_hot(torch.tensor(most), most + 1).float()
        tokens = self.tiling.grid[0] * self.tiling.grid[1]
        packed = self._pack(mark_BT[:, None].repeat(1, tokens, 1), newline_T)
        return [mark_PT.argmax(-1).where(mark_PT[:, -1] == 0, ROW_END) for mark_PT in packed]

    @cached_property
    def lengths(self) -> list[int]:
        """Packed tokens of each image, newlines included."""
        return [len(tile_P) for tile_P in self.tile_of]

    @cached_property
    def sizes(self) -> list[int]:
        """Visual tokens of each image: packed tokens without newlines."""
        return [int((tile_P != ROW_END).sum()) for tile_P in self.tile_of]

    def in_whole_image(self, kept: list[Tensor]) -> list[Tensor]:
        """The kept indices that lie in tile 0 of each image, in its raster order: tile 0 is packed first."""
        return [kept_K[tile_P[kept_K] == 0] for kept_K, tile_P in zip(kept, self.tile_of, strict=True)]

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

    def _pack(self, values_BNC: Tensor, newline_C: Tensor | None) -> list[Tensor]:
        return family_of(self.model).pack(self.model, self.tiling, values_BNC, newline_C, self.resample)


def _indices(mask_P: Tensor) -> Tensor:
    return mask_P.nonzero()[:, 0]
