"""Random."""

from atr.reduction.base import Reducer
from atr.reduction.peers._baselines import Random

DRAWS = True


def build(seed: int = 0) -> Reducer:
    """The reducer."""
    return Random(seed)
