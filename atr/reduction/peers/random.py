"""Random tokens."""

import zlib
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from atr.reduction.arguments import check_budget
from atr.reduction.base import EncoderOutput, Reducer

DRAWS = True


@dataclass(frozen=True)
class Random:
    """Distinct tokens uniformly at random; the same for the same seed and image, whatever the batch.

    The tokens of a smaller budget are a subset of those of a larger one, so that the points of a curve are
    paired.
    """

    seed: int = 0
    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, encoded: EncoderOutput, budget: int) -> Tensor:
        """`budget` indices of each image; raises ValueError unless 0 <= budget <= N."""
        check_budget(budget, encoded.tokens)
        # The last bits of computed features may depend on the batch, and would change the seed.
        image_key_BX = encoded.features_BND if encoded.image_key_BX is None else encoded.image_key_BX
        rows = [
            self._order(image_key_X, encoded.tokens)[:budget].sort().values for image_key_X in image_key_BX
        ]
        return torch.stack(rows).to(encoded.features_BND.device)

    def _order(self, image_key_X: Tensor, tokens: int) -> Tensor:
        # Seeded by the image's content, not by its place in the batch or by the process.
        content = image_key_X.detach().cpu().contiguous().view(torch.uint8).numpy()
        # The seed is the checksum's start value, because a CPU generator uses only 32 bits of its own seed.
        generator = torch.Generator().manual_seed(zlib.crc32(content.data, self.seed))
        return torch.randperm(tokens, generator=generator)


def build(seed: int = 0) -> Reducer:
    """Random tokens under a seed."""
    return Random(seed)
