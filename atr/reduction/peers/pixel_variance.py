"""PixelVariance."""

from atr.reduction.base import Reducer
from atr.reduction.peers._baselines import PixelVariance


def build(seed: int = 0) -> Reducer:
    """The reducer."""
    return PixelVariance()
