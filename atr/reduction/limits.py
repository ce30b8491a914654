"""The two ends of every curve: all visual tokens, and none."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from atr.reduction.base import EncoderOutput


@dataclass(frozen=True)
class Full:
    """All tokens, in place; raises ValueError for any budget but N."""

    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, encoded: EncoderOutput, budget: int) -> Tensor:
        """All indices of each image."""
        if budget != encoded.tokens:
            raise ValueError(f"reducer full: budget {budget} is not allowed, allowed: all {encoded.tokens}")
        features_BND = encoded.features_BND
        return torch.arange(budget, device=features_BND.device).repeat(len(features_BND), 1)


@dataclass(frozen=True)
class NoImage:
    """No tokens; raises ValueError for any budget but 0."""

    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, encoded: EncoderOutput, budget: int) -> Tensor:
        """No index for each image; keep_BK with K = 0."""
        if budget != 0:
            raise ValueError(f"reducer none: budget {budget} is not allowed, allowed: 0")
        features_BND = encoded.features_BND
        return torch.empty(len(features_BND), 0, dtype=torch.int64, device=features_BND.device)
