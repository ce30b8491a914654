"""Greedy selection by a determinantal point process, and CDPruner, which conditions it on the question."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from atr.reduction.base import EncoderOutput
from atr.reduction.greedy import CachedOrder, greedy_order_BK, min_max_BN, row_BN
from atr.reduction.similarity import (
    check_space,
    exact_cosines_BNN,
    grid_units,
    needs_of_space,
    space_BND,
    to_grid,
)

_SPENT = 1e-6
"""Residual squared length below which a unit vector counts as in the span of the chosen ones (float32)."""


def dpp_order_BK(similarity_BNN: Tensor, relevance_BN: Tensor, k: int) -> Tensor:
    """Greedy MAP of the determinantal point process of L = diag(w) S diag(w); int64 (B, k).

    The next token maximises det L of all chosen: w_j^2 times the residual of S_jj after the chosen ones
    (pivoted Cholesky). Once as many tokens are chosen as the rank of S, all residuals are 0, and so are
    all later determinants: selection then restarts among the other tokens as if none were chosen.
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

    return greedy_order_BK(weight_BN * left_BN, k, gain_BN)


def _factor_BN(similarity_BNN: Tensor, factors_BKN: Tensor, left_BN: Tensor, chosen_B1: Tensor) -> Tensor:
    """The row that a chosen token adds to the Cholesky factor; zero for a zero token."""
    known_B1K = factors_BKN.take_along_dim(chosen_B1.unsqueeze(-1), dim=2).mT
    new_BN = row_BN(similarity_BNN, chosen_B1) - (known_B1K @ factors_BKN).squeeze(1)
    pivot_B1 = left_BN.gather(1, chosen_B1)
    return torch.where(pivot_B1 > 0, new_BN / pivot_B1.sqrt(), 0.0)


@dataclass(frozen=True)
class CDPruner:
    """Diversity conditioned on the question (Zhang et al., NeurIPS 2025): `dpp_order_BK`.

    The relevance of a token is its mean cosine to the tokens of the question, scaled to 0 to 1 in each image;
    without `text` it is 1. `on` is the space of the kernel's cosines. Raises ValueError for an unknown space
    and for a sign other than 1 and -1.

    Deviations: the release compares CLIP's image and text embeddings, which other encoders do not have; here
    question and tokens are compared where the language model reads them. The release negates the cosine
    (`sign` -1), which its authors found right for CLIP alone. It scales relevance over the whole batch and
    adds 1e-6 to the numerator; here each image is scaled alone. It selects tokens twice once the rank of the
    kernel is spent. Its balance of relevance and diversity, theta, is switched off there and absent here.
    """

    text: bool = True
    sign: int = 1
    on: str = "projected"
    _orders: CachedOrder = field(default_factory=CachedOrder, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_space(self.on)
        if self.sign not in (1, -1):
            raise ValueError(f"sign: {self.sign} is not allowed, allowed: 1, -1")

    @property
    def needs(self) -> frozenset[str]:
        """The question with the projected tokens, and the fields of the kernel's space."""
        return needs_of_space(self.on) | ({"projected_BND", "text_BD"} if self.text else set())

    def __call__(self, encoded: EncoderOutput, budget: int) -> Tensor:
        """`budget` indices of each image; raises ValueError unless 0 <= budget <= N."""
        return self._orders.keep_BK(encoded, budget, self._order_BK)

    def _order_BK(self, encoded: EncoderOutput, k: int) -> Tensor:
        similarity_BNN = exact_cosines_BNN(space_BND(encoded, self.on))
        return dpp_order_BK(similarity_BNN, self._relevance_BN(encoded, similarity_BNN), k)

    def _relevance_BN(self, encoded: EncoderOutput, similarity_BNN: Tensor) -> Tensor:
        if not self.text:
            return similarity_BNN.new_ones(similarity_BNN.shape[:2])
        text_BD1 = to_grid(encoded.require("text_BD")).unsqueeze(-1)
        return min_max_BN(self.sign * (grid_units(encoded.require("projected_BND")) @ text_BD1).squeeze(-1))
