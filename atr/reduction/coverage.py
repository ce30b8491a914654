"""Saliency-weighted coverage of all tokens: greedy facility location."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from atr.reduction.arguments import check_least
from atr.reduction.base import EncoderOutput, Scorer
from atr.reduction.greedy import CachedOrder, greedy_order_BK, min_max_BN, needs_of_scores, row_BN
from atr.reduction.similarity import check_space, exact_cosines_BNN, needs_of_space, space_BND


def coverage_order_BK(similarity_BNN: Tensor, saliency_BN: Tensor, k: int) -> Tensor:
    """Facility location: argmax w_j sum_i max(0, S_ij - c_i), c_i = max(0, S_ij of the chosen); int64 (B, k).

    S is symmetric. Ties go to the lower index.
    """
    covered_BN = torch.zeros_like(saliency_BN, dtype=similarity_BNN.dtype)
    # One buffer for all steps, and sums along rows: fresh memory and column sums take two thirds of the time.
    reached_BNN = torch.empty_like(similarity_BNN)

    def gain_BN() -> Tensor:
        torch.maximum(similarity_BNN, covered_BN.unsqueeze(1), out=reached_BNN)
        return saliency_BN * (reached_BNN.sum(dim=2) - covered_BN.sum(dim=1, keepdim=True))

    def gain_after_BN(chosen_B1: Tensor) -> Tensor:
        nonlocal covered_BN
        covered_BN = torch.maximum(covered_BN, row_BN(similarity_BNN, chosen_B1))
        return gain_BN()

    return greedy_order_BK(gain_BN(), k, gain_after_BN)


@dataclass(frozen=True)
class Scope:
    """Saliency and coverage (SCOPE, Deng et al., NeurIPS 2025): `coverage_order_BK` with w = saliency^alpha.

    The saliency is the attention that a token receives, as in the paper, or the scores of another reducer,
    scaled to 0 to 1 in each image. `on` is the space of the cosines. Negative cosines cover nothing, as in
    the release. Once every token is covered by an equal one, the rest are kept from the lowest index on.
    Raises ValueError for an unknown space and for alpha < 0.
    """

    saliency: Scorer | None = None
    alpha: float = 1.0
    on: str = "features"
    _orders: CachedOrder = field(default_factory=CachedOrder, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_space(self.on)
        check_least("alpha", self.alpha, 0)

    @property
    def needs(self) -> frozenset[str]:
        """Fields of the saliency and of the space."""
        return needs_of_scores(self.saliency) | needs_of_space(self.on)

    def __call__(self, encoded: EncoderOutput, budget: int) -> Tensor:
        """`budget` indices of each image; raises ValueError unless 0 <= budget <= N."""
        return self._orders.keep_BK(encoded, budget, self._order_BK)

    def _order_BK(self, encoded: EncoderOutput, k: int) -> Tensor:
        if self.saliency is None:
            saliency_BN = encoded.require("attention_BN").double()
        else:
            saliency_BN = min_max_BN(self.saliency.scores(encoded))
        cosines_BNN = exact_cosines_BNN(space_BND(encoded, self.on))
        return coverage_order_BK(cosines_BNN, saliency_BN**self.alpha, k)
