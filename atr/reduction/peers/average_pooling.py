"""AveragePooling."""

from atr.reduction.base import Reducer
from atr.reduction.peers._merging import AveragePooling

ONE_TILE = True


def build(seed: int = 0) -> Reducer:
    """The reducer."""
    return AveragePooling()
