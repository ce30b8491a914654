"""PyramidDrop."""

from typing import Any


def build(seed: int = 0) -> Any:
    """The reducer."""
    from atr.vlm.in_llm import PyramidDrop

    return PyramidDrop()
