"""Small random batches on which reducers are checked, the smallest first.

They are the same in every run. Features have WIDTH channels, patches PATCH x PATCH pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from atr.reduction.base import EncoderOutput

IMAGES, WIDTH, PATCH = 3, 8, 2
_GRIDS = ((1, 1), (1, 5), (2, 3), (4, 4), (7, 5))


@dataclass(frozen=True)
class DrawnBatch:
    """A batch with all optional fields of EncoderOutput but `image_key_BX`.

    `tokens` are "random", all "equal", all "zero", two distinct ones "repeated", or random with the attention
    "concentrated" on one of them.
    """

    tokens: str
    grid: tuple[int, int]
    dtype: torch.dtype

    def __str__(self) -> str:
        rows, columns = self.grid
        return f"{IMAGES} images of {rows} x {columns} {self.tokens} tokens in {self.dtype}"

    @property
    def count(self) -> int:
        """Number of tokens of one image, N."""
        return self.grid[0] * self.grid[1]

    @property
    def budgets(self) -> list[int]:
        """K = 1, several, all but one, and N."""
        return sorted({1, max(1, self.count // 3), max(1, self.count - 1), self.count})

    @property
    def encoded(self) -> EncoderOutput:
        """The batch: the same values in new memory at each call, so that a reducer may overwrite them."""
        return _encoded(self).of(range(IMAGES))


def drawn_batches(tokens: Sequence[str], dtypes: Sequence[torch.dtype]) -> list[DrawnBatch]:
    """Batches of these tokens and dtypes in all grids, by rising size."""
    return [DrawnBatch(kind, grid, dtype) for grid, kind, dtype in product(_GRIDS, tokens, dtypes)]


@cache
def _encoded(batch: DrawnBatch) -> EncoderOutput:
    rows, columns = batch.grid
    generator = torch.Generator().manual_seed(rows * 100 + columns)
    features, keys, projected = (_drawn_BND(batch, width, generator) for width in (WIDTH, 3, 5))
    logits_BN = _drawn_BND(batch, 1, generator)[..., 0].float()
    pixels_BCHW = torch.randn(IMAGES, 3, PATCH * rows, PATCH * columns, generator=generator)
    return EncoderOutput(
        features,
        batch.grid,
        attention_BN=(logits_BN * (1000 if batch.tokens == "concentrated" else 1)).softmax(1),
        first_attention_BN=logits_BN.softmax(1),
        keys_BND=keys,
        projected_BND=projected,
        text_BD=F.normalize(torch.randn(IMAGES, 5, generator=generator), dim=1).to(batch.dtype),
        pixels_BCHW=(pixels_BCHW * (batch.tokens not in ("equal", "zero"))).to(batch.dtype),
        encode=_patch_colours,
    )


def _drawn_BND(batch: DrawnBatch, width: int, generator: torch.Generator) -> Tensor:
    values_BND = torch.randn(IMAGES, batch.count, width, generator=generator)
    if batch.tokens == "equal":
        values_BND = torch.full_like(values_BND, 0.3)
    elif batch.tokens == "zero":
        values_BND = torch.zeros_like(values_BND)
    elif batch.tokens == "repeated":
        twin_BN1 = torch.randint(0, min(2, batch.count), (IMAGES, batch.count, 1), generator=generator)
        values_BND = values_BND.take_along_dim(twin_BN1, 1)
    return values_BND.to(batch.dtype)


def _patch_colours(pixels_BCHW: Tensor) -> Tensor:
    """An encoder: the mean colour of each patch, repeated to WIDTH channels."""
    colours_BN3 = F.avg_pool2d(pixels_BCHW.float(), PATCH).flatten(2).mT
    return colours_BN3.repeat(1, 1, WIDTH)[..., :WIDTH].to(pixels_BCHW.dtype)
