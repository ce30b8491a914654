"""selector_mmr."""

from atr.reduction.base import Reducer
from atr.reduction.peers._diversity import MMR
from atr.reduction.selector import FeatureSelector, SelectorReducer

ONE_TILE = True
WEIGHTS = "pretrain"


def build(selector: FeatureSelector) -> Reducer:
    """The reducer."""
    return MMR(SelectorReducer(selector))
