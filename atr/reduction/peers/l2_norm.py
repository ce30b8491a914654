"""Tokens of the largest norm."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from atr.core.finite import check_finite
from atr.core.tokens import top_k_BK
from atr.reduction.base import EncoderOutput, Reducer


@dataclass(frozen=True)
class L2Norm:
    """The tokens of the largest norm."""

    needs: ClassVar[frozenset[str]] = frozenset()
    threshold: ClassVar[float | None] = None

    def __call__(self, encoded: EncoderOutput, budget: int) -> Tensor:
        """Indices of the `budget` largest norms of each image."""
        return top_k_BK(self.scores(encoded), budget)

    def scores(self, encoded: EncoderOutput) -> Tensor:
        """||x||, float32; scores_BN."""
        norms_BN: Tensor = torch.linalg.vector_norm(encoded.features_BND, dim=-1, dtype=torch.float32)
        check_finite(norms_BN, "reducer L2Norm: scores")  # squares of finite features may overflow
        return norms_BN


def build(seed: int = 0) -> Reducer:
    """Tokens of the largest norm."""
    return L2Norm()
