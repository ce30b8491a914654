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
_FEW, _MANY = 200, 4
"""Most tokens and least images at which all gains of a batch at once take less time than few of each."""
_ENTRIES = 2**16
"""Entries of the similarity read at once, so that what is computed of them stays in a cache."""


def coverage_order_BK(similarity_BNN: Tensor, saliency_BN: Tensor, k: int) -> Tensor:
    """Facility location: argmax w_j sum_i max(0, S_ij - c_i), c_i = max(0, S_ij of the chosen); int64 (B, k).

    S is symmetric. Ties go to the lower index. With `exact_cosines_BNN` all sums are exact, so that the order
    does not depend on how many gains are evaluated, nor on the device.
    """
    images, tokens = saliency_BN.shape
    is_small = tokens <= _FEW and images >= _MANY
    # On a GPU the lazy order would wait for the device in every step; a gain of negative weight has no bound.
    if is_small or similarity_BNN.device.type != "cpu" or (saliency_BN < 0).any():
        return full_order_BK(similarity_BNN, saliency_BN, k)
    order_BK = torch.empty(images, k, dtype=torch.int64)
    each = zip(order_BK, similarity_BNN.numpy(), saliency_BN.double().numpy(), strict=True)
    for order_K, similarity_NN, saliency_N in each:
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
    tokens, order_K = len(saliency_N), np.empty(k, np.int64)
    covered_N, bound_N = np.zeros(tokens, similarity_NN.dtype), np.zeros(tokens, np.float32)
    # NumPy, because a torch operation on so few entries takes several times as long; and one buffer for all.
    buffer_RN = np.empty((max(1, _ENTRIES // max(1, tokens)), tokens), similarity_NN.dtype)
    for step in range(k):
        count = tokens if step == 0 else _FIRST
        is_new_N, best = np.zeros(tokens, bool), int(bound_N.argmax())
        while not is_new_N[best]:
            for part in _parts(bound_N, best, count, len(buffer_RN)):
                rows_RN = _read(similarity_NN, part, buffer_RN)
                reached_RN = np.maximum(rows_RN, covered_N, out=buffer_RN[: len(rows_RN)])
                bound_N[part] = saliency_N[part] * (reached_RN.sum(axis=1) - covered_N.sum())
                is_new_N[part] = True
            bound_N[order_K[:step]] = -np.inf
            best, count = int(bound_N.argmax()), 8 * count
        order_K[step], bound_N[best] = best, -np.inf
        np.maximum(covered_N, similarity_NN[best], out=covered_N)
    return order_K


def _parts(bound_N: Array, best: int, count: int, size: int) -> list[slice] | list[Array]:
    """The `count` tokens of the highest bounds, `best` among them, in parts of at most `size`."""
    starts = range(0, min(count, len(bound_N)), size)
    if count >= len(bound_N):
        return [slice(start, start + size) for start in starts]
    highest = bound_N.argpartition(-count)[-count:]
    highest[0] = best  # instead of the lowest of them: argmax and argpartition break ties differently
    return [highest[start : start + size] for start in starts]


def _read(matrix_NN: Array, part: slice | Array, buffer_RN: Array) -> Array:
    """Rows of a matrix: a view, or a copy in the buffer."""
    if isinstance(part, slice):
        return matrix_NN[part]
    rows: Array = matrix_NN.take(part, axis=0, out=buffer_RN[: len(part)], mode="clip")
    return rows


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
        # On a CPU large images one after another, so that one matrix is in memory.
        is_alone = vectors_BND.device.type == "cpu" and encoded.tokens > _FEW
        images = 1 if is_alone else max(1, len(vectors_BND))
        parts = zip(torch.split(vectors_BND, images), torch.split(weight_BN, images), strict=True)
        return torch.cat([coverage_order_BK(exact_cosines_BNN(part), weight, k) for part, weight in parts])
