"""All tokens: the upper end of every curve."""

from atr.reduction.base import Reducer
from atr.reduction.limits import Full

BUDGET = "all"


def build(seed: int = 0) -> Reducer:
    """All tokens."""
    return Full()
