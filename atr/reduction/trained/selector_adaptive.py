"""selector_adaptive."""

from atr.reduction.base import Reducer
from atr.reduction.selector import FeatureSelector, SelectorReducer

BUDGET = "own"
WEIGHTS = "pretrain"


def build(selector: FeatureSelector) -> Reducer:
    """The reducer."""
    return SelectorReducer(selector)
