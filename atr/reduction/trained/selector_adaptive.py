"""The paper's selector with the number of tokens that it chooses itself: those of positive logit."""

from atr.reduction.base import Reducer
from atr.reduction.selector import FeatureSelector, SelectorReducer

BUDGET = "own"
NEEDS = ("grid",)
WEIGHTS = "pretrain"


def build(selector: FeatureSelector) -> Reducer:
    """The tokens of positive logit of a selector trained with its reconstructor."""
    return SelectorReducer(selector)
