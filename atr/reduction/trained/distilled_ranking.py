"""distilled_ranking."""

from atr.reduction.base import Reducer
from atr.reduction.selector import FeatureSelector, SelectorReducer

WEIGHTS = "distill"


def build(selector: FeatureSelector) -> Reducer:
    """The reducer."""
    return SelectorReducer(selector)
