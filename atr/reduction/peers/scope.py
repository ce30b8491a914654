"""SCOPE: coverage weighted by the attention that a token receives."""

from atr.reduction.base import Reducer
from atr.reduction.coverage import Scope

NEEDS = ("attention_BN",)


def build(seed: int = 0) -> Reducer:
    """SCOPE with its defaults."""
    return Scope()
