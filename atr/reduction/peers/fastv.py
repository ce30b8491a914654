"""FastV: visual tokens leave once, after the first layers of the language model."""

from dataclasses import dataclass
from typing import ClassVar

from atr.reduction.layer_schedule import LayerReducer, Schedule

INSIDE_LLM = True


@dataclass(frozen=True)
class FastV:
    """FastV (Chen et al., ECCV 2024): only a part of the visual tokens passes the first `layer` layers.

    Tokens are ranked by the attention of the last layer that still reads all of them, as in the release.
    """

    layer: int = 2
    needs: ClassVar[frozenset[str]] = frozenset()

    def schedule(self, layers: int, keep: float) -> Schedule:
        """One drop that leaves `keep` of all tokens; raises ValueError as Schedule does."""
        return Schedule(layers, {self.layer: keep}, own=False)


def build(seed: int = 0) -> LayerReducer:
    """FastV with its defaults."""
    return FastV()
