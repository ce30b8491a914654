"""What is made of a selector that a language model taught: its scores, and coverage of what they leave."""

from torch import Tensor

from atr.reduction.diversity import Scope
from atr.reduction.encoded import Encoded
from atr.reduction.selector import FeatureSelector, SelectorReducer


class DistilledReducer(SelectorReducer):
    """The tokens that best cover all of an image's as the language model reads them, weighed by the scores.

    Coverage is that of `Scope` over the projector's outputs. The tiles of an image are compared by the scores
    alone. They were learned at given budgets, so none of them is a threshold.
    """

    needs = SelectorReducer.needs | {"projected_BND"}
    threshold = None

    def __init__(self, selector: FeatureSelector) -> None:
        super().__init__(selector)
        self._covering = Scope(SelectorReducer(selector), on="projected")

    def __call__(self, encoded: Encoded, budget: int) -> Tensor:
        """`budget` indices of each image; raises ValueError unless 0 <= budget <= N."""
        return self._covering(encoded, budget)
