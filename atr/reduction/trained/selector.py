"""selector."""

from atr.reduction.base import Reducer
from atr.reduction.selector import FeatureSelector, SelectorReducer

WEIGHTS = "pretrain"


def build(selector: FeatureSelector) -> Reducer:
    """The reducer."""
    return SelectorReducer(selector)
