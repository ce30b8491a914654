"""Uniform."""

from atr.reduction.base import Reducer
from atr.reduction.peers._baselines import Uniform

ONE_TILE = True


def build(seed: int = 0) -> Reducer:
    """The reducer."""
    return Uniform()
