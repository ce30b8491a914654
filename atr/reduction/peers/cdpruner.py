"""CDPruner without the question: diversity alone."""

from atr.reduction.base import Reducer
from atr.reduction.determinantal import CDPruner

NEEDS = ("projected_BND",)


def build(seed: int = 0) -> Reducer:
    """CDPruner with relevance 1 for every token."""
    return CDPruner(text=False)
