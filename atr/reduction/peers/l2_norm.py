"""L2Norm."""

from atr.reduction.base import Reducer
from atr.reduction.peers._baselines import L2Norm


def build(seed: int = 0) -> Reducer:
    """The reducer."""
    return L2Norm()
