"""Peers that keep tokens unlike one another: DivPrune, CDPruner, DART, SCOPE and the MMR of IDPruner.

All but DART choose one token after another. Their functions take cosines and the weight of each token and
return order_BK, the tokens in the order of choice, so that a prefix is the choice for a smaller budget.

A batched matrix product may round otherwise than that of one image, and an image's tokens must not depend on
its batch. `cosines_BNN` therefore has nothing to round, and scores are compared in float32, less finely than
they are computed.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from atr.core.tokens import shares
from atr.reduction.base import EncoderOutput, Scorer

_UNIT = 2.0**26
_COSINE = 2.0**36
_SPENT = 1e-6
"""Squared length that a unit vector has left at which it lies in the span of the others, to float32."""
_SPACES = ("features", "projected")


def cosines_BNN(features_BND: Tensor) -> Tensor:
    """Cosines of all pairs of tokens, 0 with a token that is zero; float64 (B, N, N), symmetric.

    The same whatever the batch, and for equal tokens equal: the entries of the unit vectors are multiples of
    2^-26, so that no partial sum of their products needs more than the bits of float64. Sums of the cosines
    over 2^16 tokens are exact too, as these are multiples of 2^-36.
    """
    units_BND = _units(features_BND)
    return _to_multiples(units_BND @ units_BND.mT, _COSINE)


def mmr_order_BK(similarity_BNN: Tensor, importance_BN: Tensor, k: int, balance: float = 0.5) -> Tensor:
    """Maximal marginal relevance: first argmax w_i, then argmax b w_i - (1 - b) max over chosen j of S_ij.

    b is the balance. Ties go to the lower index; int64 (B, k).
    """
    importance_BN = importance_BN.double()
    closest_BN = torch.full_like(importance_BN, -torch.inf)

    def relevance_BN(chosen_B1: Tensor) -> Tensor:
        nonlocal closest_BN
        closest_BN = torch.maximum(closest_BN, _row_BN(similarity_BNN, chosen_B1))
        return balance * importance_BN - (1 - balance) * closest_BN

    return _greedy_BK(importance_BN, k, relevance_BN)


def max_min_order_BK(similarity_BNN: Tensor, k: int) -> Tensor:
    """First the token farthest from its nearest neighbour, then each farthest from the chosen; int64 (B, k).

    Ties go to the lower index. This is maximal marginal relevance without importance but in the first step.
    """
    itself_NN = torch.eye(similarity_BNN.shape[1], dtype=torch.bool, device=similarity_BNN.device)
    neighbour_BN = similarity_BNN.masked_fill(itself_NN, -torch.inf).amax(dim=-1)
    return mmr_order_BK(similarity_BNN, -neighbour_BN, k, balance=0.0)


def coverage_order_BK(similarity_BNN: Tensor, saliency_BN: Tensor, k: int) -> Tensor:
    """Facility location: argmax w_j sum_i max(0, S_ij - c_i), c_i = max(0, S_ij of the chosen); int64 (B, k).

    S is symmetric. Ties go to the lower index.
    """
    covered_BN = torch.zeros_like(saliency_BN, dtype=similarity_BNN.dtype)
    # Two thirds of the time would go into fresh memory at every step, and into sums down the columns.
    reached_BNN = torch.empty_like(similarity_BNN)

    def gain_BN() -> Tensor:
        torch.maximum(similarity_BNN, covered_BN.unsqueeze(1), out=reached_BNN)
        return saliency_BN * (reached_BNN.sum(dim=2) - covered_BN.sum(dim=1, keepdim=True))

    def gain_after_BN(chosen_B1: Tensor) -> Tensor:
        nonlocal covered_BN
        covered_BN = torch.maximum(covered_BN, _row_BN(similarity_BNN, chosen_B1))
        return gain_BN()

    return _greedy_BK(gain_BN(), k, gain_after_BN)


def dpp_order_BK(similarity_BNN: Tensor, relevance_BN: Tensor, k: int) -> Tensor:
    """Greedy MAP of the determinantal point process of L = diag(w) S diag(w); int64 (B, k).

    The next token maximises det L of all chosen, which is w_j^2 times what of S_jj they leave unexplained
    (pivoted Cholesky). Where they leave nothing of any other token, as after as many as the rank of S, all
    later determinants are 0: the choice among the other tokens then begins anew, as if none were chosen.
    Ties go to the lower index.
    """
    weight_BN = relevance_BN.double().square()
    free_BN = similarity_BNN.diagonal(dim1=1, dim2=2)
    left_BN = free_BN
    factors_BKN = similarity_BNN.new_zeros(len(similarity_BNN), k, similarity_BNN.shape[1])
    step = 0

    def gain_BN(chosen_B1: Tensor) -> Tensor:
        nonlocal free_BN, left_BN, step
        factor_BN = _factor_BN(similarity_BNN, factors_BKN[:, :step], left_BN, chosen_B1)
        factors_BKN[:, step], step = factor_BN, step + 1
        free_BN = free_BN.scatter(1, chosen_B1, 0.0)
        left_BN = left_BN - factor_BN.square()
        left_BN = left_BN.masked_fill(left_BN <= _SPENT, 0.0).scatter(1, chosen_B1, 0.0)
        spent_B1 = (weight_BN * left_BN).amax(dim=1, keepdim=True) <= 0
        if spent_B1.any():
            left_BN = torch.where(spent_B1, free_BN, left_BN)
            factors_BKN.masked_fill_(spent_B1.unsqueeze(-1), 0.0)
        return weight_BN * left_BN

    return _greedy_BK(weight_BN * left_BN, k, gain_BN)


def _factor_BN(similarity_BNN: Tensor, factors_BKN: Tensor, left_BN: Tensor, chosen_B1: Tensor) -> Tensor:
    """The row that a chosen token adds to the Cholesky factor; zero for a token that is zero."""
    known_B1K = factors_BKN.take_along_dim(chosen_B1.unsqueeze(-1), dim=2).mT
    row_BN = _row_BN(similarity_BNN, chosen_B1) - (known_B1K @ factors_BKN).squeeze(1)
    pivot_B1 = left_BN.gather(1, chosen_B1)
    return torch.where(pivot_B1 > 0, row_BN / pivot_B1.sqrt(), 0.0)


def _greedy_BK(scores_BN: Tensor, k: int, scores_after: Callable[[Tensor], Tensor]) -> Tensor:
    """Take the token of the highest score k times; `scores_after` is told each, and gives the next scores."""
    order_BK = torch.empty(len(scores_BN), k, dtype=torch.int64, device=scores_BN.device)
    taken_BN = torch.zeros_like(scores_BN, dtype=torch.bool)
    for step in range(k):
        if step:
            scores_BN = scores_after(order_BK[:, step - 1 : step])
        best_B1 = scores_BN.float().masked_fill(taken_BN, -torch.inf).argmax(dim=1, keepdim=True)
        taken_BN = taken_BN.scatter(1, best_B1, True)
        order_BK[:, step : step + 1] = best_B1
    return order_BK


def _row_BN(matrix_BNN: Tensor, index_B1: Tensor) -> Tensor:
    return matrix_BNN.take_along_dim(index_B1.unsqueeze(-1), dim=1).squeeze(1)


def _units(vectors: Tensor) -> Tensor:
    tiny = torch.finfo(torch.float64).tiny
    return _to_multiples(F.normalize(vectors.double(), dim=-1, eps=tiny), _UNIT)


def _to_multiples(values: Tensor, of_one: float) -> Tensor:
    return (values * of_one).round() / of_one


def _min_max_BN(scores_BN: Tensor) -> Tensor:
    """Each image's scores stretched to 0 to 1; all 1 where they are equal."""
    low_B1, high_B1 = scores_BN.double().aminmax(dim=1, keepdim=True)
    return torch.where(high_B1 > low_B1, (scores_BN - low_B1) / (high_B1 - low_B1), 1.0)


class _Orders:
    """The order of one batch, which serves all its budgets up to the one it was made for."""

    def __init__(self) -> None:
        self._last: tuple[EncoderOutput, Tensor] | None = None

    @torch.no_grad()
    def keep_BK(
        self, encoded: EncoderOutput, budget: int, order_BK: Callable[[EncoderOutput, int], Tensor]
    ) -> Tensor:
        """The first `budget` tokens of the order, in raster order. Raises ValueError unless in range."""
        _check_budget(encoded, budget)
        if self._last is None or self._last[0] is not encoded or self._last[1].shape[1] < budget:
            self._last = encoded, order_BK(encoded, budget)
        return self._last[1][:, :budget].sort(dim=1).values


def _check_budget(encoded: EncoderOutput, budget: int) -> None:
    if not 0 <= budget <= encoded.tokens:
        raise ValueError(f"budget: {budget} is out of range, allowed: 0 to {encoded.tokens} tokens")


def _check_space(on: str) -> None:
    if on not in _SPACES:
        raise ValueError(f"on: {on!r} is unknown, allowed: {', '.join(_SPACES)}")


def _space_BND(encoded: EncoderOutput, on: str) -> Tensor:
    """The tokens as the encoder gives them, or as the projector does."""
    if on == "features":
        return encoded.features_BND
    assert encoded.projected_BND is not None, "named in needs"
    return encoded.projected_BND


def _needs_space(on: str) -> frozenset[str]:
    return frozenset({"projected_BND"}) if on == "projected" else frozenset()


def _needs_scores(scorer: Scorer | None) -> frozenset[str]:
    return frozenset({"attention_BN"}) if scorer is None else scorer.needs


@dataclass(frozen=True)
class DivPrune:
    """Max-min diversity of the tokens (Alvar et al., CVPR 2025): `max_min_order_BK`.

    `on` is the space of the cosines: the projector's outputs, as in the paper, or the encoder's features.
    Where tokens are equal the release takes some twice; here they are tokens like others, taken last.
    """

    on: str = "projected"
    _orders: _Orders = field(default_factory=_Orders, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _check_space(self.on)

    @property
    def needs(self) -> frozenset[str]:
        """The projector's outputs, where the cosines are theirs."""
        return _needs_space(self.on)

    def __call__(self, encoded: EncoderOutput, budget: int) -> Tensor:
        """`budget` indices of each image; raises ValueError unless 0 <= budget <= N."""
        return self._orders.keep_BK(encoded, budget, self._order_BK)

    def _order_BK(self, encoded: EncoderOutput, k: int) -> Tensor:
        return max_min_order_BK(cosines_BNN(_space_BND(encoded, self.on)), k)


@dataclass(frozen=True)
class CDPruner:
    """Diversity conditioned on the question (Zhang et al., NeurIPS 2025): `dpp_order_BK`.

    The relevance of a token is its mean cosine to the tokens of the question, from 0 to 1 in each image;
    without `text` it is 1. `on` is the space of the kernel's cosines. The release compares CLIP's image and
    text embeddings, which other encoders do not have: here the question and the tokens are compared where the
    language model reads them. It also takes the cosine's negative, which its authors found right for CLIP
    alone: `sign` -1. It stretches relevance over the whole batch instead of each image, adding 1e-6 to the
    numerator, and takes tokens twice once the rank of the kernel is spent. Its balance of relevance and
    diversity, theta, is switched off there and absent here.
    """

    text: bool = True
    sign: int = 1
    on: str = "projected"
    _orders: _Orders = field(default_factory=_Orders, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _check_space(self.on)
        if self.sign not in (1, -1):
            raise ValueError(f"sign: {self.sign} is not allowed, allowed: 1, -1")

    @property
    def needs(self) -> frozenset[str]:
        """The question and the tokens beside it, and the space of the kernel."""
        return _needs_space(self.on) | ({"projected_BND", "text_BD"} if self.text else set())

    def __call__(self, encoded: EncoderOutput, budget: int) -> Tensor:
        """`budget` indices of each image; raises ValueError unless 0 <= budget <= N."""
        return self._orders.keep_BK(encoded, budget, self._order_BK)

    def _order_BK(self, encoded: EncoderOutput, k: int) -> Tensor:
        similarity_BNN = cosines_BNN(_space_BND(encoded, self.on))
        return dpp_order_BK(similarity_BNN, self._relevance_BN(encoded, similarity_BNN), k)

    def _relevance_BN(self, encoded: EncoderOutput, similarity_BNN: Tensor) -> Tensor:
        if not self.text:
            return similarity_BNN.new_ones(similarity_BNN.shape[:2])
        assert encoded.projected_BND is not None and encoded.text_BD is not None, "named in needs"
        text_BD1 = _to_multiples(encoded.text_BD.double(), _UNIT).unsqueeze(-1)
        return _min_max_BN(self.sign * (_units(encoded.projected_BND) @ text_BD1).squeeze(-1))


@dataclass(frozen=True)
class Dart:
    """Duplication-aware reduction (DART, Wen et al., EMNLP 2025), on the encoder's features.

    The pivots are the tokens with the longest keys (L1 norm, as in the release). Each in turn, the longest
    first, adds the tokens of the rest that are least similar to it, all about equally many.
    DART prunes inside the language model: it has as many pivots in the prompt, and keys of all heads, here
    their mean. The release keeps its pivots beyond the budget (132 tokens for 128); here they count. Neither
    the order of the pivots nor how the budget divides where it does not do so evenly is told: here the first
    pivots add one more. With a budget below their number the longest keys alone are kept.
    """

    pivots: int = 4
    needs: ClassVar[frozenset[str]] = frozenset({"keys_BND"})

    def __post_init__(self) -> None:
        if self.pivots < 1:
            raise ValueError(f"pivots: {self.pivots} is out of range, allowed: 1 and more")

    @torch.no_grad()
    def __call__(self, encoded: EncoderOutput, budget: int) -> Tensor:
        """`budget` indices of each image; raises ValueError unless 0 <= budget <= N."""
        _check_budget(encoded, budget)
        assert encoded.keys_BND is not None, "named in needs"
        length_BN = encoded.keys_BND.double().abs().sum(dim=-1).float()
        pivots = min(self.pivots, budget)
        pivots_BP = _lowest_BK(-length_BN, pivots)
        units_BND = _units(encoded.features_BND)
        similarity_BPN = units_BND.take_along_dim(pivots_BP.unsqueeze(-1), dim=1) @ units_BND.mT
        kept_BN = torch.zeros_like(length_BN, dtype=torch.bool).scatter(1, pivots_BP, True)
        for pivot, count in enumerate(shares(budget - pivots, [encoded.tokens] * pivots)):
            rest_BN = similarity_BPN[:, pivot].masked_fill(kept_BN, torch.inf)
            kept_BN = kept_BN.scatter(1, _lowest_BK(rest_BN, count), True)
        return kept_BN.nonzero()[:, 1].reshape(len(kept_BN), budget)


def _lowest_BK(values_BN: Tensor, k: int) -> Tensor:
    """Indices of the k lowest values, rising, ties to the lower index."""
    return values_BN.float().sort(dim=1, stable=True).indices[:, :k]


@dataclass(frozen=True)
class Scope:
    """Saliency and coverage (SCOPE, Deng et al., NeurIPS 2025): `coverage_order_BK` with w = saliency^alpha.

    The saliency is the attention that a token receives, as in the paper, or the scores of another reducer,
    from 0 to 1 in each image. `on` is the space of the cosines. The cosine of opposed tokens covers nothing,
    as in the release. Once all tokens are covered, by equal ones, the rest are kept from the lowest index on.
    """

    saliency: Scorer | None = None
    alpha: float = 1.0
    on: str = "features"
    _orders: _Orders = field(default_factory=_Orders, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _check_space(self.on)
        if self.alpha < 0:
            raise ValueError(f"alpha: {self.alpha} is out of range, allowed: 0 and more")

    @property
    def needs(self) -> frozenset[str]:
        """What gives the saliency, and the space of the cosines."""
        return _needs_scores(self.saliency) | _needs_space(self.on)

    def __call__(self, encoded: EncoderOutput, budget: int) -> Tensor:
        """`budget` indices of each image; raises ValueError unless 0 <= budget <= N."""
        return self._orders.keep_BK(encoded, budget, self._order_BK)

    def _order_BK(self, encoded: EncoderOutput, k: int) -> Tensor:
        if self.saliency is None:
            assert encoded.attention_BN is not None, "named in needs"
            saliency_BN = encoded.attention_BN.double()
        else:
            saliency_BN = _min_max_BN(self.saliency.scores(encoded))
        return coverage_order_BK(cosines_BNN(_space_BND(encoded, self.on)), saliency_BN**self.alpha, k)


@dataclass(frozen=True)
class MMR:
    """Importance and diversity (IDPruner, Tan et al., 2026, arXiv 2602.13315): `mmr_order_BK`.

    The importance, from 0 to 1 in each image, is the attention that a token receives or the scores of another
    reducer; IDPruner trains a scorer of its own. `on` is the space of the cosines, `balance` its lambda.
    """

    importance: Scorer | None = None
    balance: float = 0.5
    on: str = "features"
    _orders: _Orders = field(default_factory=_Orders, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _check_space(self.on)
        if not 0 <= self.balance <= 1:
            raise ValueError(f"balance: {self.balance} is out of range, allowed: 0 to 1")

    @property
    def needs(self) -> frozenset[str]:
        """What gives the importance, and the space of the cosines."""
        return _needs_scores(self.importance) | _needs_space(self.on)

    def __call__(self, encoded: EncoderOutput, budget: int) -> Tensor:
        """`budget` indices of each image; raises ValueError unless 0 <= budget <= N."""
        return self._orders.keep_BK(encoded, budget, self._order_BK)

    def _order_BK(self, encoded: EncoderOutput, k: int) -> Tensor:
        importance_BN = encoded.attention_BN if self.importance is None else self.importance.scores(encoded)
        assert importance_BN is not None, "named in needs"
        return mmr_order_BK(
            cosines_BNN(_space_BND(encoded, self.on)), _min_max_BN(importance_BN), k, self.balance
        )
