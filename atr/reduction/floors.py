"""Reducers that learn nothing and look at nothing: the lines every curve is read against."""

import zlib
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from atr.reduction.encoded import Encoded


@dataclass(frozen=True)
class Full:
    """All tokens, in place; defined for budget N alone (ValueError otherwise)."""

    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, encoded: Encoded, budget: int) -> Tensor:
        """All indices of each image."""
        if budget != encoded.tokens:
            raise ValueError(f"reducer full: budget {budget} is not allowed, allowed: all {encoded.tokens}")
        features_BND = encoded.features_BND
        return torch.arange(budget, device=features_BND.device).repeat(len(features_BND), 1)


@dataclass(frozen=True)
class NoImage:
    """No token at all; defined for budget 0 alone (ValueError otherwise)."""

    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, encoded: Encoded, budget: int) -> Tensor:
        """No index for each image."""
        if budget != 0:
            raise ValueError(f"reducer none: budget {budget} is not allowed, allowed: 0")
        features_BND = encoded.features_BND
        return torch.empty(len(features_BND), 0, dtype=torch.int64, device=features_BND.device)


@dataclass(frozen=True)
class Random:
    """Distinct tokens uniformly at random, the same for the same seed and image whatever the batch.

    A smaller budget keeps a subset of a larger one's tokens, so that the points of a curve are paired.
    """

    seed: int = 0
    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, encoded: Encoded, budget: int) -> Tensor:
        """`budget` indices of each image; raises ValueError unless 0 <= budget <= N."""
        if not 0 <= budget <= encoded.tokens:
            raise ValueError(f"budget: {budget} is out of range, allowed: 0 to {encoded.tokens} tokens")
        rows = [self._order(features_ND)[:budget].sort().values for features_ND in encoded.features_BND]
        return torch.stack(rows).to(encoded.features_BND.device)

    def _order(self, features_ND: Tensor) -> Tensor:
        # Seeded by the image's own content: neither its place in the batch nor the process can matter.
        content = features_ND.detach().cpu().contiguous().view(torch.uint8).numpy()
        # The seed starts the checksum, as a CPU generator looks at no more than 32 bits of its own seed.
        generator = torch.Generator().manual_seed(zlib.crc32(content.data, self.seed))
        return torch.randperm(len(features_ND), generator=generator)
