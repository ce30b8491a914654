"""Dart."""

from atr.reduction.base import Reducer
from atr.reduction.peers._diversity import Dart


def build(seed: int = 0) -> Reducer:
    """The reducer."""
    return Dart()
