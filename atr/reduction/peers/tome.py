"""ToMe: token merging, after the encoder; G groups of merged tokens in raster order of their positions."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from atr.core.tokens import top_k_BK
from atr.reduction.base import EncoderOutput, Reducer
from atr.reduction.merging import group_means

MERGES = True
NEEDS = ("keys_BND",)
ONE_TILE = True


@dataclass(frozen=True)
class ToMe:
    """Token merging by bipartite soft matching (Bolya et al., ICLR 2023, section 3), after the encoder.

    A step splits the tokens alternately into a and b, finds for each token of a the most similar one of b by
    the cosine of their keys (averaged over heads), and merges the r most similar pairs. A merged token is the
    mean of the encoder's tokens in it (the paper's size-weighted mean), and so is its key.

    Deviations: the paper merges r tokens in every layer; here, after the encoder, steps that merge
    r <= n / 2 of the n remaining tokens are repeated until K remain. The paper leaves open in which order a
    step splits tokens merged by the step before; here in raster order, where a merged token has the position
    of its token of b.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"keys_BND"})

    def __call__(self, encoded: EncoderOutput, budget: int) -> Tensor:
        """Positions of the merged tokens and of those left alone."""
        return self._groups(encoded, budget)[0]

    def merge(self, encoded: EncoderOutput, budget: int) -> tuple[Tensor, Tensor]:
        """The positions and the means of the tokens merged there."""
        keep_BK, group_BN = self._groups(encoded, budget)
        return keep_BK, group_means(encoded.features_BND, group_BN, budget)

    def _groups(self, encoded: EncoderOutput, budget: int) -> tuple[Tensor, Tensor]:
        """Positions (B, K) of the groups, and the group of each token (B, N)."""
        # A product's last bits depend on the batch: rounded from double precision, ties stay ties.
        keys_BND = encoded.require("keys_BND").double()
        keep_BG = group_BN = torch.arange(encoded.tokens, device=keys_BND.device).repeat(len(keys_BND), 1)
        while (groups := keep_BG.shape[1]) > budget:
            joined_BG = _step(group_means(keys_BND, group_BN, groups), min(groups - budget, groups // 2))
            stays_BG = joined_BG == torch.arange(groups, device=joined_BG.device)
            group_BN = (stays_BG.cumsum(dim=1) - 1).gather(1, joined_BG).gather(1, group_BN)
            keep_BG = keep_BG[stays_BG].reshape(len(keep_BG), -1)
        return keep_BG, group_BN


def _step(keys_BGD: Tensor, count: int) -> Tensor:
    """One step of the matching: the group that each group is merged into, or itself; int64 (B, G)."""
    unit_BGD = F.normalize(keys_BGD, dim=-1)
    similarity_BAb = (unit_BGD[:, ::2] @ unit_BGD[:, 1::2].mT).float()
    best_BA, into_BA = similarity_BAb.max(dim=-1)
    merged_BR = top_k_BK(best_BA, count)
    joined_BG = torch.arange(keys_BGD.shape[1], device=keys_BGD.device).repeat(len(keys_BGD), 1)
    return joined_BG.scatter_(1, 2 * merged_BR, 2 * into_BA.gather(1, merged_BR) + 1)


def build(seed: int = 0) -> Reducer:
    """ToMe after the encoder."""
    return ToMe()
