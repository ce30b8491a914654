"""PruMerge."""

from atr.reduction.base import Reducer
from atr.reduction.peers._attention import PruMerge

ONE_TILE = True


def build(seed: int = 0) -> Reducer:
    """The reducer."""
    return PruMerge()
