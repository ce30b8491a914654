"""The paper's selector: the tokens with the highest keep logits."""

from atr.reduction.base import Reducer
from atr.reduction.selector import FeatureSelector, SelectorReducer

NEEDS = ("grid",)
WEIGHTS = "pretrain"


def build(selector: FeatureSelector) -> Reducer:
    """The top K of a selector trained with its reconstructor."""
    return SelectorReducer(selector)
