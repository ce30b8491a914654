"""MMR."""

from atr.reduction.base import Reducer
from atr.reduction.peers._diversity import MMR


def build(seed: int = 0) -> Reducer:
    """The reducer."""
    return MMR()
