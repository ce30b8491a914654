"""PruMergePlus."""

from atr.reduction.base import Reducer
from atr.reduction.peers._attention import PruMergePlus

ONE_TILE = True


def build(seed: int = 0) -> Reducer:
    """The reducer."""
    return PruMergePlus()
