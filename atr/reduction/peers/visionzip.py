"""VisionZip: dominant tokens, and contextual tokens merged from the rest; C contextual tokens."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from atr.core.tokens import mask_of
from atr.reduction.arguments import check_fraction, check_implementation, part_of
from atr.reduction.attention_ranking import attended_and_spread
from atr.reduction.base import EncoderOutput, Reducer
from atr.reduction.merging import weighted_sums
from atr.reduction.similarity import precise, rounded_cosines_BNN

MERGES = True
NEEDS = ("attention_BN", "keys_BND")
ONE_TILE = True


@dataclass(frozen=True)
class VisionZip:
    """VisionZip (CVPR 2025, arXiv 2412.04467): dominant tokens, and contextual ones merged from the rest.

    `contextual` of the budget, rounded down, are targets at an even stride over the raster of the tokens not
    chosen by attention; each other token is assigned to the target with the most similar key. The default
    gives all of the paper's splits: 54 + 10, 108 + 20 and 162 + 30. A target becomes the mean of itself and
    its tokens ("paper"), or itself plus the mean of its tokens ("release"). Raises ValueError for an unknown
    variant and unless 0 <= contextual <= 1.

    The paper leaves open a stride that is not whole; the release rounds it down, so that the last rows have
    no target. The release counts the class token among the dominant ones; the features here have none.
    """

    contextual: float = 5 / 32
    variant: str = "paper"
    needs: ClassVar[frozenset[str]] = frozenset({"attention_BN", "keys_BND"})

    def __post_init__(self) -> None:
        check_fraction("contextual", self.contextual)
        check_implementation("variant", self.variant)

    def __call__(self, encoded: EncoderOutput, budget: int) -> Tensor:
        """Indices of the dominant and of the contextual tokens."""
        return torch.cat(self._chosen(encoded, budget), dim=1).sort(dim=1).values

    def merge(self, encoded: EncoderOutput, budget: int) -> tuple[Tensor, Tensor]:
        """The kept indices; dominant tokens unchanged, contextual ones merged."""
        dominant_BM, target_BC = self._chosen(encoded, budget)
        keep_BK = torch.cat([dominant_BM, target_BC], dim=1).sort(dim=1).values
        own_BKN = F.one_hot(keep_BK, encoded.tokens)
        others_BKN = self._assigned(encoded, keep_BK, target_BC)
        counts_BK1 = others_BKN.sum(dim=2, keepdim=True)
        if self.variant == "paper":
            weights_BKN = precise(own_BKN + others_BKN) / (1 + counts_BK1)
        else:
            weights_BKN = own_BKN + precise(others_BKN) / counts_BK1.clamp_min(1)
        return keep_BK, weighted_sums(weights_BKN, encoded.features_BND)

    def _chosen(self, encoded: EncoderOutput, budget: int) -> tuple[Tensor, Tensor]:
        return attended_and_spread(encoded, budget, part_of(self.contextual, budget))

    def _assigned(self, encoded: EncoderOutput, keep_BK: Tensor, target_BC: Tensor) -> Tensor:
        """1 for a dropped token in the row of its target, else 0; int64 (B, K, N)."""
        if not target_BC.shape[1]:
            return keep_BK.new_zeros(*keep_BK.shape, encoded.tokens)
        is_target_B1N = mask_of(target_BC, encoded.tokens)[:, None] > 0
        similar_BNN = rounded_cosines_BNN(encoded.require("keys_BND"))
        target_BN = similar_BNN.masked_fill(~is_target_B1N, -torch.inf).argmax(dim=2)
        dropped_B1N = mask_of(keep_BK, encoded.tokens)[:, None] == 0
        return ((target_BN[:, None] == keep_BK[..., None]) & dropped_B1N).long()


def build(seed: int = 0) -> Reducer:
    """VisionZip with its defaults."""
    return VisionZip()
