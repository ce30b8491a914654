"""Maximal marginal relevance of the attention that a token receives."""

from atr.reduction.base import Reducer
from atr.reduction.marginal_relevance import MMR

NEEDS = ("attention_BN",)


def build(seed: int = 0) -> Reducer:
    """Maximal marginal relevance with its defaults."""
    return MMR()
