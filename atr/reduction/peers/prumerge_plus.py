"""PruMerge+: PruMerge with evenly spread tokens in addition to the most attended ones."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from atr.reduction.arguments import check_fraction, check_implementation, check_least, part_of
from atr.reduction.attention_ranking import attended_and_spread
from atr.reduction.base import EncoderOutput, Reducer
from atr.reduction.neighbour_merging import merge_neighbours

MERGES = True
NEEDS = ("attention_BN", "keys_BND")
ONE_TILE = True


@dataclass(frozen=True)
class PruMergePlus:
    """PruMerge+ (arXiv 2403.15388): evenly spread tokens besides the outliers; merges as `PruMerge` does.

    `uniform` of the budget, rounded down, are tokens at an even stride over the raster of those not chosen by
    attention; the others are the most attended. Raises ValueError for an unknown variant, negative
    `neighbours`, and unless 0 <= uniform <= 1.

    Deviation: the release takes a stride over all tokens, a third of N / outliers (about three tokens for
    each outlier), and drops those chosen already; its count depends on the overlap.
    """

    uniform: float = 0.75
    neighbours: int = 32
    variant: str = "paper"
    needs: ClassVar[frozenset[str]] = frozenset({"attention_BN", "keys_BND"})

    def __post_init__(self) -> None:
        check_fraction("uniform", self.uniform)
        check_least("neighbours", self.neighbours, 0)
        check_implementation("variant", self.variant)

    def __call__(self, encoded: EncoderOutput, budget: int) -> Tensor:
        """Indices of the most attended tokens and of the evenly spread ones."""
        chosen = attended_and_spread(encoded, budget, part_of(self.uniform, budget))
        return torch.cat(chosen, dim=1).sort(dim=1).values

    def merge(self, encoded: EncoderOutput, budget: int) -> tuple[Tensor, Tensor]:
        """The kept indices, and the kept features with their neighbours added."""
        keep_BK = self(encoded, budget)
        return keep_BK, merge_neighbours(encoded, keep_BK, self.neighbours, self.variant)


def build(seed: int = 0) -> Reducer:
    """PruMerge+ with its defaults."""
    return PruMergePlus()
