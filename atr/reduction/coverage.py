"""Saliency-weighted coverage of all tokens: greedy facility location."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from atr.reduction.arguments import check_least
from atr.reduction.base import EncoderOutput, Scorer
from atr.reduction.greedy import CachedOrder, greedy_order_BK, min_max_BN, needs_of_scores, row_BN
from atr.reduction.similarity import check_space, exact_cosines_BNN, needs_of_space, space_BND

Array = NDArray[Any]

_FIRST = 16
"""Gains evaluated at first in a step; eight times as many in each further round of it."""
_ENTRIES = 2**16
"""Entries of the similarity read at once, so that what is computed of them stays in a cache."""


def coverage_order_BK(similarity_BNN: Tensor, saliency_BN: Tensor, k: int) -> Tensor:
    """Facility location: argmax w_j sum_i max(0, S_ij - c_i), c_i = max(0, S_ij of the chosen); int64 (B, k).

    S is symmetric. Ties go to the lower index. With `exact_cosines_BNN` all sums are exact, so that the order
    does not depend on how many gains are evaluated, nor on the device.
    """
    # On a GPU the lazy order would wait for the device in every step; a gain of negative weight has no bound.
    if similarity_BNN.device.type != "cpu" or (saliency_BN < 0).any():
        return full_order_BK(similarity_BNN, saliency_BN, k)
    order_BK = torch.empty(len(similarity_BNN), k, dtype=torch.int64)
    images = zip(order_BK, similarity_BNN.numpy(), saliency_BN.double().numpy(), strict=True)
    for order_K, similarity_NN, saliency_N in images:
        order_K.copy_(torch.from_numpy(_lazy_order_K(similarity_NN, saliency_N, k)))
    return order_BK


def full_order_BK(similarity_BNN: Tensor, saliency_BN: Tensor, k: int) -> Tensor:
    """The order by the gains of all tokens in every step."""
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


def _lazy_order_K(similarity_NN: Array, saliency_N: Array, k: int) -> Array:
    """The order of one image by few gains in each step (lazy greedy, Minoux, 1978); weights are 0 or more.

    Gains only fall, so the last one is a bound: a token is taken if its gain is new and no bound higher.
    """
    tokens = len(saliency_N)
    covered_N = np.zeros(tokens, similarity_NN.dtype)
    bound_N = np.empty(tokens, np.float32)
    is_new_N, order_K = np.zeros(tokens, bool), np.empty(k, np.int64)
    # NumPy, because a torch operation on so few entries takes several times as long; and one buffer for all.
    buffer = np.empty((max(1, _ENTRIES // max(1, tokens)), tokens), similarity_NN.dtype)

    def evaluate(tokens_X: Array) -> None:
        total = covered_N.sum()
        for start in range(0, len(tokens_X), len(buffer)):
            part_X = tokens_X[start : start + len(buffer)]
            reached_XN = similarity_NN.take(part_X, axis=0, out=buffer[: len(part_X)], mode="clip")
            np.maximum(reached_XN, covered_N, out=reached_XN)
            bound_N[part_X] = saliency_N[part_X] * (reached_XN.sum(axis=1) - total)
        is_new_N[tokens_X] = True

    evaluate(np.arange(tokens))
    for step in range(k):
        count = _FIRST
        while not is_new_N[best := bound_N.argmax()]:
            evaluate(_highest(bound_N, best, count))
            count *= 8
        order_K[step], bound_N[best], is_new_N[:] = best, -np.inf, False
        np.maximum(covered_N, similarity_NN[best], out=covered_N)
    return order_K


def _highest(bound_N: Array, best: np.intp, count: int) -> Array:
    """The `count` tokens of the highest bounds without those taken, of bound -inf; `best` among them."""
    least = max(0, len(bound_N) - count)
    highest: Array = bound_N.argpartition(least)[least:]
    if least:
        highest[0] = best  # instead of the lowest of them: argmax and argpartition break ties differently
    highest = highest[bound_N[highest] != -np.inf]
    return highest


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
        weight_BN, vectors_BND = saliency_BN**self.alpha, space_BND(encoded, self.on)
        # On a CPU one image after another, so that one matrix is in memory.
        images = 1 if vectors_BND.device.type == "cpu" else max(1, len(vectors_BND))
        parts = zip(torch.split(vectors_BND, images), torch.split(weight_BN, images), strict=True)
        return torch.cat([coverage_order_BK(exact_cosines_BNN(part), weight, k) for part, weight in parts])
