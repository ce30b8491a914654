"""selector_scope."""

from atr.reduction.base import Reducer
from atr.reduction.peers._diversity import Scope
from atr.reduction.selector import FeatureSelector, SelectorReducer

ONE_TILE = True
WEIGHTS = "pretrain"


def build(selector: FeatureSelector) -> Reducer:
    """The reducer."""
    return Scope(SelectorReducer(selector))
