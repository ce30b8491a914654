"""CDPruner: diversity conditioned on the question."""

from atr.reduction.base import Reducer
from atr.reduction.determinantal import CDPruner

NEEDS = ("projected_BND", "text_BD")


def build(seed: int = 0) -> Reducer:
    """CDPruner with its defaults."""
    return CDPruner()
