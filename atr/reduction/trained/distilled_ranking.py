"""The distilled selector's highest scores, without coverage."""

from atr.reduction.base import Reducer
from atr.reduction.selector import FeatureSelector, SelectorReducer

NEEDS = ("grid",)
WEIGHTS = "distill"


def build(selector: FeatureSelector) -> Reducer:
    """The top K of a selector distilled from a language model."""
    return SelectorReducer(selector)
