"""The way of the tokens of all tiles into the sequences that a language model reads, and back.

Features, scores and marks go the same way, through the host, so that nothing is worked out a second time.
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
"""In the place of a tile: a newline token."""


@dataclass(frozen=True)
class TileLayout:
    """How a batch's images are packed; `resample=False` leaves out OneVision's shrinking of large images."""

    model: Any
    tiling: Tiling
    resample: bool = True

    def tokens(self, encoded: EncoderOutput) -> list[Tensor]:
        """The tokens of each image as the language model is fed them, nothing dropped: (P, D) each."""
        assert encoded.projected_BND is not None, "encoded for a language model"
        return self._pack(encoded.projected_BND, None)

    def values(self, values_BNC: Tensor) -> list[Tensor]:
        """Values of each packed token, (P, C) an image; zero for newlines."""
        return self._pack(values_BNC, values_BNC.new_zeros(values_BNC.shape[-1]))

    @cached_property
    def tile_of(self) -> list[Tensor]:
        """The tile that each packed token comes from, ROW_END for a newline; int64 (P,) an image, on the CPU.

        A token that was resampled from several tiles is of the one that weighs most in it.
        """
        most = max(self.tiling.tiles)
        tile_B = torch.cat([torch.arange(tiles) for tiles in self.tiling.tiles])
        mark_BT = F.one_hot(tile_B, most + 1).float()
        newline_T = F.one_hot(torch.tensor(most), most + 1).float()
        tokens = self.tiling.grid[0] * self.tiling.grid[1]
        packed = self._pack(mark_BT[:, None].repeat(1, tokens, 1), newline_T)
        return [mark_PT.argmax(-1).where(mark_PT[:, -1] == 0, ROW_END) for mark_PT in packed]

    @property
    def lengths(self) -> list[int]:
        """Packed tokens of each image, newlines among them."""
        return [len(tile_P) for tile_P in self.tile_of]

    @property
    def sizes(self) -> list[int]:
        """Visual tokens of each image: packed tokens without the newlines."""
        return [int((tile_P != ROW_END).sum()) for tile_P in self.tile_of]

    def in_whole_image(self, kept: list[Tensor]) -> list[Tensor]:
        """Of the kept indices those of tile 0, in its raster order: it is packed first, and as it comes."""
        return [kept_K[tile_P[kept_K] == 0] for kept_K, tile_P in zip(kept, self.tile_of, strict=True)]

    def groups(self, budget: str) -> list[list[Tensor]]:
        """Indices of the packed tokens, not newlines, that share a budget: of each image, or of each tile."""
        if budget == "image":
            return [[_indices(tile_P != ROW_END)] for tile_P in self.tile_of]
        return [
            [_indices(tile_P == tile) for tile in range(tiles)]
            for tile_P, tiles in zip(self.tile_of, self.tiling.tiles, strict=True)
        ]

    def with_newlines(self, kept: list[Tensor], newline: str) -> list[Tensor]:
        """The kept indices and the newlines that stay: all (keep), or of rows with a kept token (follow)."""
        stay = []
        for tile_P, kept_K, tiles in zip(self.tile_of, kept, self.tiling.tiles, strict=True):
            end_P = tile_P == ROW_END
            row_P = end_P.cumsum(0) - end_P.long()  # a newline belongs to the row that it ends
            in_rows_K = kept_K[tile_P[kept_K] > 0] if tiles > 1 else kept_K  # the whole image has no rows
            used_P = torch.isin(row_P, row_P[in_rows_K]) if newline == "follow" else torch.ones_like(end_P)
            stay.append(torch.cat([kept_K, _indices(end_P & used_P)]).sort().values)
        return stay

    def _pack(self, values_BNC: Tensor, newline_C: Tensor | None) -> list[Tensor]:
        return family_of(self.model).pack(self.model, self.tiling, values_BNC, newline_C, self.resample)


def _indices(mask_P: Tensor) -> Tensor:
    return mask_P.nonzero()[:, 0]
