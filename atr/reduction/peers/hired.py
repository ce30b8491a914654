"""HiRED: a budget for each tile, and in a tile the most attended tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from atr.core.tokens import top_k_BK
from atr.reduction.arguments import check_budget, check_fraction, part_of
from atr.reduction.base import EncoderOutput, Reducer
from atr.reduction.quotas import parts_N, quotas_BC

NEEDS = ("attention_BN", "first_attention_BN", "grid")


@dataclass(frozen=True)
class HiRED:
    """HiRED (AAAI 2025, arXiv 2408.10945): a budget for each tile, in a tile the most attended tokens.

    The tile that shows the whole image gets `alpha` of the budget; the others share the rest in proportion to
    the first layer's attention to their regions of that tile. On an image of one tile it equals
    ClassAttention. Raises ValueError unless 0 <= alpha <= 1.

    The paper leaves open to which tile a token on a border belongs (here to that of its upper left corner)
    and how padding counts (here with its tile). The release counts the best 1 - alpha of the tokens instead
    of summing attention, takes runs of the raster as regions and rounds shares down; it keeps fewer tokens
    than the budget and is not implemented.
    """

    alpha: float = 0.5
    needs: ClassVar[frozenset[str]] = frozenset({"attention_BN", "first_attention_BN", "grid"})
    threshold: ClassVar[float | None] = None

    def __post_init__(self) -> None:
        check_fraction("alpha", self.alpha)

    def __call__(self, encoded: EncoderOutput, budget: int) -> Tensor:
        """Indices of the `budget` most attended tokens of each tile."""
        return top_k_BK(self.scores(encoded), budget)

    def scores(self, encoded: EncoderOutput) -> Tensor:
        """The attention; scores_BN."""
        return encoded.require("attention_BN")

    def apportion(
        self,
        encoded: EncoderOutput,
        tile: int,
        arrangement: tuple[int, int],
        budget: int,
        sizes: Sequence[int],
    ) -> list[int]:
        """Tokens kept of each tile of the image that `tile` shows whole; see the function `apportion`."""
        first_N = encoded.require("first_attention_BN")[tile]
        return apportion(budget, first_N, encoded.require_grid(), arrangement, sizes, self.alpha)


def apportion(
    budget: int,
    first_attention_N: Tensor,
    grid: tuple[int, int],
    arrangement: tuple[int, int],
    sizes: Sequence[int],
    alpha: float = 0.5,
) -> list[int]:
    """HiRED's split of an image's budget over tiles of `sizes` tokens, the first of which shows it whole.

    `first_attention_N` and `grid` are that tile's; `arrangement` is rows and columns of the others. No count
    is above its tile's size, and they sum to `budget`: ValueError if that is impossible.
    """
    whole, others = sizes[0], torch.tensor(sizes[1:], dtype=torch.int64)
    check_budget(budget, sum(sizes))
    first = max(min(part_of(alpha, budget), whole), budget - int(others.sum()))
    mass_C = torch.zeros(len(others), dtype=torch.float64)
    if len(others):
        mass_C.index_add_(0, parts_N(grid, arrangement), first_attention_N.cpu().double())
    return [first, *quotas_BC(budget - first, mass_C[None], others)[0].tolist()]


def build(seed: int = 0) -> Reducer:
    """HiRED with its defaults."""
    return HiRED()
