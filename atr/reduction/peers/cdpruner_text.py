"""CDPruner."""

from atr.reduction.base import Reducer
from atr.reduction.peers._diversity import CDPruner


def build(seed: int = 0) -> Reducer:
    """The reducer."""
    return CDPruner()
