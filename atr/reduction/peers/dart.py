"""DART: tokens least similar to a few pivots; P pivots."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from atr.core.tokens import shares
from atr.reduction.arguments import check_budget, check_least
from atr.reduction.base import EncoderOutput, Reducer
from atr.reduction.similarity import grid_units

NEEDS = ("keys_BND",)


@dataclass(frozen=True)
class Dart:
    """Duplication-aware reduction (DART, Wen et al., EMNLP 2025), on the encoder's features.

    The pivots are the tokens with the longest keys (L1 norm, as in the release). Each in turn, the longest
    first, adds the remaining tokens least similar to it, all pivots nearly equally many. With a budget below
    the number of pivots only the longest keys are kept. Raises ValueError for pivots < 1.

    Deviations: DART prunes inside the language model, with as many pivots in the prompt and the keys of all
    heads; here keys are averaged over heads. The release keeps its pivots beyond the budget (132 tokens for
    128); here they count. The paper leaves open the order of the pivots and a budget that does not divide
    evenly; here the first pivots add one token more.
    """

    pivots: int = 4
    needs: ClassVar[frozenset[str]] = frozenset({"keys_BND"})

    def __post_init__(self) -> None:
        check_least("pivots", self.pivots, 1)

    @torch.no_grad()
    def __call__(self, encoded: EncoderOutput, budget: int) -> Tensor:
        """`budget` indices of each image; raises ValueError unless 0 <= budget <= N."""
        check_budget(budget, encoded.tokens)
        length_BN = encoded.require("keys_BND").double().abs().sum(dim=-1).float()
        pivots = min(self.pivots, budget)
        pivots_BP = _lowest_BK(-length_BN, pivots)
        units_BND = grid_units(encoded.features_BND)
        similarity_BPN = units_BND.take_along_dim(pivots_BP.unsqueeze(-1), dim=1) @ units_BND.mT
        kept_BN = torch.zeros_like(length_BN, dtype=torch.bool).scatter(1, pivots_BP, True)
        for pivot, count in enumerate(shares(budget - pivots, [encoded.tokens] * pivots)):
            rest_BN = similarity_BPN[:, pivot].masked_fill(kept_BN, torch.inf)
            kept_BN = kept_BN.scatter(1, _lowest_BK(rest_BN, count), True)
        return kept_BN.nonzero()[:, 1].reshape(len(kept_BN), budget)


def _lowest_BK(values_BN: Tensor, k: int) -> Tensor:
    """Indices of the k lowest values, rising, ties to the lower index."""
    return values_BN.float().sort(dim=1, stable=True).indices[:, :k]


def build(seed: int = 0) -> Reducer:
    """DART with its defaults."""
    return Dart()
