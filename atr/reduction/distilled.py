"""The default reducer of a distilled selector: coverage for the first tokens, then the highest scores."""

import torch
from torch import Tensor

from atr.core import tokens
from atr.core.tokens import top_k_BK
from atr.reduction.base import EncoderOutput
from atr.reduction.coverage import Scope
from atr.reduction.selector import FeatureSelector, SelectorReducer

COVERED = 0.1
"""Fraction of an image's tokens chosen by coverage, before the highest scores of the others.

Coverage helps most where few tokens are kept. Each of its choices depends on all earlier ones, so that
rounding in the first may change every later one, while a ranking changes only where two scores are close.
With this limit most tokens are stable, and coverage takes equally many steps at any larger budget.
"""


class DistilledReducer(SelectorReducer):
    """The tokens that best cover the image as the language model reads it, then the highest scores.

    Coverage is `Scope` over the projector's outputs, weighted by the scores, up to COVERED of the tokens. The
    tiles of an image are compared by the scores alone. The scores were learned at given budgets, so none
    is a threshold.
    """

    needs = SelectorReducer.needs | {"projected_BND"}
    threshold = None

    def __init__(self, selector: FeatureSelector) -> None:
        super().__init__(selector)
        self._coverage = Scope(self, on="projected")

    def __call__(self, encoded: EncoderOutput, budget: int) -> Tensor:
        """`budget` indices of each image; raises ValueError unless 0 <= budget <= N."""
        covered = min(budget, tokens.budget(COVERED, encoded.tokens))
        first_BK = self._coverage(encoded, covered)
        return top_k_BK(self.scores(encoded).scatter(1, first_BK, torch.inf), budget)
