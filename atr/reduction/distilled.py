"""What is made of a selector that a language model taught: coverage where tokens are few, then its scores."""

import torch
from torch import Tensor

from atr.core import tokens
from atr.core.tokens import top_k_BK
from atr.reduction.base import EncoderOutput
from atr.reduction.peers._diversity import Scope
from atr.reduction.selector import FeatureSelector, SelectorReducer

COVERED = 0.1
"""Fraction of an image's tokens that coverage chooses, before the best scores of the others.

It is worth most where few tokens are left. Each of its picks depends on all before, so that a rounding in the
first may change every later one, while a ranking changes where two scores are close: by scores alone the rest
of the tokens moves little, and coverage takes as many steps at any budget.
"""


class DistilledReducer(SelectorReducer):
    """The tokens that best cover all of an image's as the language model reads them, then the best scores.

    Coverage is that of `Scope` over the projector's outputs, weighed by the scores, up to COVERED of the
    tokens. The tiles of an image are compared by the scores alone. They were learned at given budgets, so
    none of them is a threshold.
    """

    needs = SelectorReducer.needs | {"projected_BND"}
    threshold = None

    def __init__(self, selector: FeatureSelector) -> None:
        super().__init__(selector)
        self._covering = Scope(SelectorReducer(selector), on="projected")

    def __call__(self, encoded: EncoderOutput, budget: int) -> Tensor:
        """`budget` indices of each image; raises ValueError unless 0 <= budget <= N."""
        covered = min(budget, tokens.budget(COVERED, encoded.tokens))
        first_BK = self._covering(encoded, covered)
        return top_k_BK(self.scores(encoded).scatter(1, first_BK, torch.inf), budget)
