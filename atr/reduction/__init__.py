"""Token reduction: the paper's selector with its training, and the methods it is compared with.

A reducer is one file of `peers` or `trained`, or the user's own; `atr.reduction.registry` builds it by name.
"""

from atr.reduction.base import Adaptive, EncoderOutput, Merger, Reducer, Scorer
from atr.reduction.limits import Full, NoImage
from atr.reduction.selector import FeatureSelector, SelectorReducer

__all__ = [
    "Adaptive",
    "EncoderOutput",
    "FeatureSelector",
    "Full",
    "Merger",
    "NoImage",
    "Reducer",
    "Scorer",
    "SelectorReducer",
]
