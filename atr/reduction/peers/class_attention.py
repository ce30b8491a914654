"""ClassAttention."""

from atr.reduction.base import Reducer
from atr.reduction.peers._attention import ClassAttention


def build(seed: int = 0) -> Reducer:
    """The reducer."""
    return ClassAttention()
