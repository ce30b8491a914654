"""HiRED."""

from atr.reduction.base import Reducer
from atr.reduction.peers._attention import HiRED


def build(seed: int = 0) -> Reducer:
    """The reducer."""
    return HiRED()
