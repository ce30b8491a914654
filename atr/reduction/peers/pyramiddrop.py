"""PyramidDrop: visual tokens leave after each quarter of the language model's layers."""

from dataclasses import dataclass
from typing import ClassVar

from atr.reduction.layer_schedule import LayerReducer, Schedule

INSIDE_LLM = True


@dataclass(frozen=True)
class PyramidDrop:
    """PyramidDrop (Xing et al., CVPR 2025): fewer visual tokens after each quarter of the layers.

    Tokens are ranked by the attention of the layer that follows the drop, as in the release. A language model
    of fewer than four layers has one stage for each layer.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    def schedule(self, layers: int, keep: float) -> Schedule:
        """Each drop leaves `keep` of the tokens before it (0.5 in the paper); ValueError for one layer."""
        if layers < 2:
            raise ValueError(f"language model: {layers} layer, allowed: two or more")
        stages = min(4, layers)
        drops = {layers * part // stages: keep**part for part in range(1, stages)}
        return Schedule(layers, drops, own=True)


def build(seed: int = 0) -> LayerReducer:
    """PyramidDrop with its defaults."""
    return PyramidDrop()
