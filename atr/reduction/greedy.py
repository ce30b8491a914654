"""Greedy selection, one token after another.

`order_BK` has the tokens in the order of choice: a prefix of it is the selection for a smaller budget. Scores
are compared in float32, more coarsely than they are computed, and ties go to the lower index, so that a
selection does not depend on the batch.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from atr.reduction.arguments import check_budget
from atr.reduction.base import EncoderOutput, Scorer


class CachedOrder:
    """The order of the last batch, reused for every budget up to the one it was computed for."""

    def __init__(self) -> None:
        self._last: tuple[EncoderOutput, Tensor] | None = None

    @torch.no_grad()
    def keep_BK(
        self, encoded: EncoderOutput, budget: int, order_BK: Callable[[EncoderOutput, int], Tensor]
    ) -> Tensor:
        """The first `budget` tokens of the order, in raster order; ValueError unless 0 <= budget <= N."""
        check_budget(budget, encoded.tokens)
        if self._last is None or self._last[0] is not encoded or self._last[1].shape[1] < budget:
            self._last = encoded, order_BK(encoded, budget)
        return self._last[1][:, :budget].sort(dim=1).values


def greedy_order_BK(scores_BN: Tensor, k: int, scores_after: Callable[[Tensor], Tensor]) -> Tensor:
    """Take the token with the highest score k times; int64 (B, k).

    `scores_after` receives the token just taken, (B, 1), and returns the scores for the next step.
    """
    order_BK = torch.empty(len(scores_BN), k, dtype=torch.int64, device=scores_BN.device)
    taken_BN = torch.zeros_like(scores_BN, dtype=torch.bool)
    for step in range(k):
        if step:
            scores_BN = scores_after(order_BK[:, step - 1 : step])
        best_B1 = scores_BN.float().masked_fill(taken_BN, -torch.inf).argmax(dim=1, keepdim=True)
        taken_BN = taken_BN.scatter(1, best_B1, True)
        order_BK[:, step : step + 1] = best_B1
    return order_BK


def row_BN(matrix_BNN: Tensor, index_B1: Tensor) -> Tensor:
    """One row of each image's matrix."""
    return matrix_BNN.take_along_dim(index_B1.unsqueeze(-1), dim=1).squeeze(1)


def min_max_BN(scores_BN: Tensor) -> Tensor:
    """Scores of each image scaled to 0 to 1, float64; all 1 if they are equal."""
    low_B1, high_B1 = scores_BN.double().aminmax(dim=1, keepdim=True)
    return torch.where(high_B1 > low_B1, (scores_BN - low_B1) / (high_B1 - low_B1), 1.0)


def needs_of_scores(scorer: Scorer | None) -> frozenset[str]:
    """Fields of EncoderOutput read by a scorer, or the attention if there is no scorer."""
    return frozenset({"attention_BN"}) if scorer is None else scorer.needs
