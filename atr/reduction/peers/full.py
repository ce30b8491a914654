"""Full."""

from atr.reduction.base import Reducer
from atr.reduction.peers._baselines import Full

BUDGET = "all"


def build(seed: int = 0) -> Reducer:
    """The reducer."""
    return Full()
