"""Tokens of the highest attention."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from atr.core.tokens import top_k_BK
from atr.reduction.base import EncoderOutput, Reducer

NEEDS = ("attention_BN",)


@dataclass(frozen=True)
class ClassAttention:
    """The most attended tokens: the core of FasterVLM (arXiv 2412.01818v1) and of HiRED."""

    needs: ClassVar[frozenset[str]] = frozenset({"attention_BN"})
    threshold: ClassVar[float | None] = None

    def __call__(self, encoded: EncoderOutput, budget: int) -> Tensor:
        """Indices of the `budget` most attended tokens of each image."""
        return top_k_BK(self.scores(encoded), budget)

    def scores(self, encoded: EncoderOutput) -> Tensor:
        """The attention; scores_BN."""
        return encoded.require("attention_BN")


def build(seed: int = 0) -> Reducer:
    """Tokens of the highest attention."""
    return ClassAttention()
