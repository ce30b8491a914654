"""PruMerge with the number of tokens that it chooses itself: the outliers of each image's attention."""

from atr.reduction.base import Reducer
from atr.reduction.neighbour_merging import PruMerge

BUDGET = "own"
MERGES = True
NEEDS = ("attention_BN", "keys_BND")
ONE_TILE = True


def build(seed: int = 0) -> Reducer:
    """PruMerge with its defaults."""
    return PruMerge()
