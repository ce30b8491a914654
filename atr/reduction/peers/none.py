"""NoImage."""

from atr.reduction.base import Reducer
from atr.reduction.peers._baselines import NoImage

BUDGET = "nothing"


def build(seed: int = 0) -> Reducer:
    """The reducer."""
    return NoImage()
