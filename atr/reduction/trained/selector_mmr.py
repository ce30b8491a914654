"""Maximal marginal relevance of the selector's keep logits."""

from atr.reduction.base import Reducer
from atr.reduction.marginal_relevance import MMR
from atr.reduction.selector import FeatureSelector, SelectorReducer

NEEDS = ("grid",)
ONE_TILE = True
WEIGHTS = "pretrain"


def build(selector: FeatureSelector) -> Reducer:
    """Maximal marginal relevance of a selector trained with its reconstructor."""
    return MMR(SelectorReducer(selector))
