"""How kept tokens may be laid out for the language model; `atr.vlm.reduce.reduce` explains the choices."""

from typing import Literal, get_args

Positions = Literal["original", "contiguous"]
Budget = Literal["image", "tile"]
Newline = Literal["keep", "follow"]
Interpolation = Literal["model", "off"]

LAYOUT: dict[str, tuple[str, ...]] = {
    "positions": get_args(Positions),
    "budget": get_args(Budget),
    "newline": get_args(Newline),
    "interpolation": get_args(Interpolation),
}
"""The choices of each parameter."""
