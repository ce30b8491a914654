"""distilled."""

from atr.reduction.base import Reducer
from atr.reduction.distilled import DistilledReducer
from atr.reduction.selector import FeatureSelector

WEIGHTS = "distill"


def build(selector: FeatureSelector) -> Reducer:
    """The reducer."""
    return DistilledReducer(selector)
