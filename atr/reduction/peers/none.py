"""No tokens: how far the language model gets without the image."""

from atr.reduction.base import Reducer
from atr.reduction.limits import NoImage

BUDGET = "nothing"


def build(seed: int = 0) -> Reducer:
    """No tokens."""
    return NoImage()
