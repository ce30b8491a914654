"""Evenly spaced tokens."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from atr.reduction.base import EncoderOutput, Reducer
from atr.reduction.rectangles import middle_tokens_BK

NEEDS = ("grid",)
ONE_TILE = True


@dataclass(frozen=True)
class Uniform:
    """The middle tokens of `rectangles`: an even two-dimensional stride for every budget."""

    needs: ClassVar[frozenset[str]] = frozenset({"grid"})

    def __call__(self, encoded: EncoderOutput, budget: int) -> Tensor:
        """The same `budget` positions in each image."""
        return middle_tokens_BK(encoded, budget)


def build(seed: int = 0) -> Reducer:
    """Evenly spaced tokens."""
    return Uniform()
