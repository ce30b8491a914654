"""The distilled selector: coverage of the first tokens, then the highest scores."""

from atr.reduction.base import Reducer
from atr.reduction.distilled import DistilledReducer
from atr.reduction.selector import FeatureSelector

NEEDS = ("grid", "projected_BND")
WEIGHTS = "distill"


def build(selector: FeatureSelector) -> Reducer:
    """Coverage and scores of a selector distilled from a language model."""
    return DistilledReducer(selector)
