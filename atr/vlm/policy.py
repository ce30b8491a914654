"""How many tokens of an image are kept, and how the kept tokens are laid out for the language model."""

from collections.abc import Sequence
from dataclasses import dataclass

from atr.core import tokens
from atr.core.layout import LAYOUT

ADAPTIVE = "adaptive"
"""Given instead of a budget: the reducer chooses the count of each image."""
POSITIONS = "original"
"""Default position ids of kept tokens; selectors are trained and evaluated with it."""


def check_choice(key: str, value: str) -> None:
    """Raise ValueError if a layout parameter has an unknown value."""
    if value not in LAYOUT[key]:
        raise ValueError(f"{key}: {value!r} is unknown, allowed: {', '.join(LAYOUT[key])}")


@dataclass(frozen=True)
class Policy:
    """The budget and the layout of kept tokens; fields, meaning and errors as in `atr.vlm.reduce.reduce`."""

    keep: float | str
    positions: str = POSITIONS
    budget: str = "image"
    newline: str = "keep"
    bounds: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        for key in ("positions", "budget", "newline"):
            check_choice(key, getattr(self, key))
        if isinstance(self.keep, str):
            if self.keep != ADAPTIVE:
                raise ValueError(f"keep: {self.keep!r} is unknown, allowed: a fraction, a count, {ADAPTIVE}")
        else:
            object.__setattr__(self, "keep", _checked_keep(self.keep))
        object.__setattr__(self, "bounds", _checked_bounds(self.bounds))
        if self.keep != ADAPTIVE and self.bounds != (0.0, 1.0):
            raise ValueError(
                f"bounds: {self.bounds} is not allowed with keep {self.keep}, only with {ADAPTIVE}"
            )


def _checked_keep(given: float) -> float:
    keep = tokens.parse_number("keep", given)
    if not _is_possible(keep):
        raise ValueError(f"keep: {keep} is out of range, allowed: a fraction 0 <= keep <= 1, or an int >= 0")
    return keep


def _checked_bounds(bounds: Sequence[float]) -> tuple[float, float]:
    allowed = "allowed: two fractions or counts, the lower first"
    if isinstance(bounds, str) or not hasattr(bounds, "__len__") or len(bounds) != 2:
        raise ValueError(f"bounds: {bounds!r} is not allowed, {allowed}")
    low, high = (tokens.parse_number("bounds", bound) for bound in bounds)
    if not (_is_possible(low) and _is_possible(high)) or (type(low) is type(high) and low > high):
        raise ValueError(f"bounds: {(low, high)} is out of range, {allowed}")
    return low, high


def _is_possible(keep: float) -> bool:
    """Whether an image can have this count or fraction of tokens."""
    return keep >= 0 and (isinstance(keep, int) or keep <= 1)
