"""Coverage weighted by the selector's keep logits."""

from atr.reduction.base import Reducer
from atr.reduction.coverage import Scope
from atr.reduction.selector import FeatureSelector, SelectorReducer

NEEDS = ("grid",)
ONE_TILE = True
WEIGHTS = "pretrain"


def build(selector: FeatureSelector) -> Reducer:
    """Coverage by a selector trained with its reconstructor."""
    return Scope(SelectorReducer(selector))
