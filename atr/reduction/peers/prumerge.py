"""PruMerge under a given budget."""

from atr.reduction.base import Reducer
from atr.reduction.neighbour_merging import PruMerge

MERGES = True
NEEDS = ("attention_BN", "keys_BND")
ONE_TILE = True


def build(seed: int = 0) -> Reducer:
    """PruMerge with its defaults."""
    return PruMerge()
