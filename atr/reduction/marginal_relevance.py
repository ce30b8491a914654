"""Maximal marginal relevance and its special case, max-min diversity."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from atr.reduction.arguments import check_fraction
from atr.reduction.base import EncoderOutput, Scorer
from atr.reduction.greedy import CachedOrder, greedy_order_BK, min_max_BN, needs_of_scores, row_BN
from atr.reduction.similarity import check_space, exact_cosines_BNN, needs_of_space, space_BND


def mmr_order_BK(similarity_BNN: Tensor, importance_BN: Tensor, k: int, balance: float = 0.5) -> Tensor:
    """Maximal marginal relevance: first argmax w_i, then argmax b w_i - (1 - b) max over chosen j of S_ij.

    b is the balance. Ties go to the lower index; int64 (B, k).
    """
    importance_BN = importance_BN.double()
    closest_BN = torch.full_like(importance_BN, -torch.inf)

    def relevance_BN(chosen_B1: Tensor) -> Tensor:
        nonlocal closest_BN
        closest_BN = torch.maximum(closest_BN, row_BN(similarity_BNN, chosen_B1))
        return balance * importance_BN - (1 - balance) * closest_BN

    return greedy_order_BK(importance_BN, k, relevance_BN)


def max_min_order_BK(similarity_BNN: Tensor, k: int) -> Tensor:
    """First the token farthest from its nearest neighbour, then each farthest from the chosen; int64 (B, k).

    Ties go to the lower index. This is maximal marginal relevance whose importance counts in the first step
    alone.
    """
    itself_NN = torch.eye(similarity_BNN.shape[1], dtype=torch.bool, device=similarity_BNN.device)
    neighbour_BN = similarity_BNN.masked_fill(itself_NN, -torch.inf).amax(dim=-1)
    return mmr_order_BK(similarity_BNN, -neighbour_BN, k, balance=0.0)


@dataclass(frozen=True)
class MMR:
    """Importance and diversity (IDPruner, Tan et al., 2026, arXiv 2602.13315): `mmr_order_BK`.

    The importance, scaled to 0 to 1 in each image, is the attention that a token receives or the scores of
    another reducer; IDPruner trains a scorer of its own. `on` is the space of the cosines, `balance` the
    paper's lambda. Raises ValueError for an unknown space and unless 0 <= balance <= 1.
    """

    importance: Scorer | None = None
    balance: float = 0.5
    on: str = "features"
    _orders: CachedOrder = field(default_factory=CachedOrder, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_space(self.on)
        check_fraction("balance", self.balance)

    @property
    def needs(self) -> frozenset[str]:
        """Fields of the importance and of the space."""
        return needs_of_scores(self.importance) | needs_of_space(self.on)

    def __call__(self, encoded: EncoderOutput, budget: int) -> Tensor:
        """`budget` indices of each image; raises ValueError unless 0 <= budget <= N."""
        return self._orders.keep_BK(encoded, budget, self._order_BK)

    def _order_BK(self, encoded: EncoderOutput, k: int) -> Tensor:
        if self.importance is None:
            importance_BN = encoded.require("attention_BN")
        else:
            importance_BN = self.importance.scores(encoded)
        cosines_BNN = exact_cosines_BNN(space_BND(encoded, self.on))
        return mmr_order_BK(cosines_BNN, min_max_BN(importance_BN), k, self.balance)
