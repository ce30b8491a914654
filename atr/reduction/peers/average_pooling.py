"""Average pooling over rectangles of the grid."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from atr.reduction.base import EncoderOutput, Reducer
from atr.reduction.merging import group_means
from atr.reduction.rectangles import middle_tokens_BK, rectangle_of_N, rectangles

MERGES = True
NEEDS = ("grid",)
ONE_TILE = True


@dataclass(frozen=True)
class AveragePooling:
    """The mean of each of `rectangles`, in the place of its middle token."""

    needs: ClassVar[frozenset[str]] = frozenset({"grid"})

    def __call__(self, encoded: EncoderOutput, budget: int) -> Tensor:
        """The middle tokens, the same in each image."""
        return middle_tokens_BK(encoded, budget)

    def merge(self, encoded: EncoderOutput, budget: int) -> tuple[Tensor, Tensor]:
        """The middle tokens and the means of their rectangles."""
        grid, features_BND = encoded.require_grid(), encoded.features_BND
        group_N = rectangle_of_N(grid, rectangles(grid, budget)).to(features_BND.device)
        means_BKD = group_means(features_BND, group_N.expand(len(features_BND), -1), budget)
        return self(encoded, budget), means_BKD


def build(seed: int = 0) -> Reducer:
    """Average pooling."""
    return AveragePooling()
