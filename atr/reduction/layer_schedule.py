"""Schedules of token removal between the layers of a language model; plain arithmetic, no model."""

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from atr.core import tokens

STEPS = 2**30
"""Resolution at which `keep_for` searches the fractions from 0 to 1; finer than one token of any image."""
LEFT_OUT = "chooses between the layers of a language model"
"""Why a LayerReducer is left out of measurements of the tokens that a language model is given."""


@dataclass(frozen=True)
class Schedule:
    """The fraction of an image's visual tokens that remains, by decoder layer.

    `drops` maps a layer, counted from 0, to the fraction that it and later layers read. The tokens with the
    most attention from the prompt's last token stay (mean over heads), measured in the layer before the drop
    (`own=False`) or in the layer itself. Raises ValueError for no drop, a layer outside 1 to `layers` - 1,
    and a fraction outside 0 to 1 or above an earlier one.
    """

    layers: int
    drops: Mapping[int, float]
    own: bool

    def __post_init__(self) -> None:
        if not self.drops:
            raise ValueError("drops: there is none, allowed: one or more")
        before = 1.0
        for layer, keep in sorted(self.drops.items()):
            before = self._checked_fraction(layer, keep, before)

    def _checked_fraction(self, layer: int, keep: float, before: float) -> float:
        if not 1 <= layer < self.layers:
            raise ValueError(f"layer: {layer} is out of range, allowed: 1 <= layer < {self.layers} layers")
        fraction = tokens.parse_number("keep", keep)
        if isinstance(fraction, int) or not 0 <= fraction <= before:
            raise ValueError(
                f"keep: {keep} is out of range, allowed: 0 <= keep <= {before:g}, a fraction and no count"
            )
        return fraction

    def left(self, layer: int) -> float:
        """Fraction of an image's visual tokens that a layer reads."""
        passed = [drop for drop in self.drops if drop <= layer]
        return float(tokens.parse_number("keep", self.drops[max(passed)])) if passed else 1.0

    def count(self, layer: int, size: int) -> int:
        """How many of `size` visual tokens a layer reads."""
        return tokens.budget(self.left(layer), size)

    @property
    def fraction(self) -> float:
        """Fraction that a layer reads, averaged over the layers, before counts are rounded."""
        return sum(map(self.left, range(self.layers))) / self.layers

    def mean(self, size: int) -> float:
        """How many of `size` visual tokens a layer reads, averaged over the layers.

        Methods that remove tokens before the language model are compared with others at this number.
        """
        return sum(self.count(layer, size) for layer in range(self.layers)) / self.layers


@runtime_checkable
class LayerReducer(Protocol):
    """A reducer that removes visual tokens between the layers of the language model."""

    @property
    def needs(self) -> frozenset[str]:
        """Names of the optional fields of EncoderOutput that it reads."""
        ...

    def schedule(self, layers: int, keep: float) -> Schedule:
        """Schedule for a language model of `layers` layers, `keep` the fraction left by one drop.

        Raises ValueError as Schedule does.
        """
        ...


def lowest(reducer: LayerReducer, layers: int, size: int) -> float:
    """The least fraction of `size` tokens that a layer can read on average: each drop leaves one token."""
    return reducer.schedule(layers, 1 / STEPS).mean(size) / size


def keep_for(reducer: LayerReducer, mean: float, layers: int, size: int) -> float | None:
    """The `keep` for which layers read the fraction `mean` of the tokens on average.

    None if `mean` is below the lowest fraction of `size` tokens. Raises ValueError as `schedule` does.
    """
    if mean < lowest(reducer, layers, size):
        return None

    def fraction(step: int) -> float:
        return reducer.schedule(layers, step / STEPS).fraction

    return bisect_left(range(STEPS + 1), mean, key=fraction) / STEPS
