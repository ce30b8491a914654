"""Field types that several sections share, with their ranges."""

from collections.abc import Collection
from typing import Annotated, Literal

from pydantic import AfterValidator, AllowInfNan, BeforeValidator, ConfigDict, Field, ValidationInfo

from atr.config.errors import UNKNOWN, join, refusal

STRICT = ConfigDict(strict=True, allow_inf_nan=False)
"""No value is converted to another type, except an int to a float."""

MANY = 2**31 - 1
"""Largest count; libraries overflow beyond it."""
PROCESSES = 2**16
"""Largest number of processes or devices."""
LAYERS = 1024
"""Maximum layers of a network, or heads of a layer; guards memory against a typo."""

Count = Annotated[int, Field(ge=1, le=MANY)]
Workers = Annotated[int, Field(ge=0, le=PROCESSES)]
LayerCount = Annotated[int, Field(ge=1, le=LAYERS)]
OpenFraction = Annotated[float, Field(gt=0, lt=1)]
"""Excludes 0 and 1."""
Share = Annotated[float, Field(ge=0, lt=1)]
"""Includes 0, excludes 1."""
LearningRate = Annotated[float, Field(gt=0, le=1)]


def _check_layer(layer: object) -> object:
    is_index = type(layer) is int and -LAYERS <= layer <= LAYERS
    if not (is_index or layer is None or layer == "merged"):
        raise refusal(layer, f"null, merged, or -{LAYERS} <= layer <= {LAYERS}")
    return layer


EncoderLayer = Annotated[int | Literal["merged"], BeforeValidator(_check_layer)]
"""Index into `hidden_states`, or merged: the tokens that the language model is fed."""
OptionalEncoderLayer = Annotated[int | Literal["merged"] | None, BeforeValidator(_check_layer)]
Pixels = Annotated[int | None, Field(ge=1, le=MANY)]


def are_distinct(values: Collection[object]) -> bool:
    """Whether there is at least one value and none occurs twice."""
    return len(set(values)) == len(values) > 0


def check_fractions(values: list[float], info: ValidationInfo) -> list[float]:
    """Refuse kept fractions that are out of range, or that figures and tables would print alike."""
    distinguishable = are_distinct([f"{value:g}" for value in values]) and len(values) <= 100
    if not (distinguishable and all(0 < value <= 1 for value in values)):
        raise refusal(
            values, f"1 to 100 distinct fractions, 0 < {info.field_name} <= 1, that differ in six digits"
        )
    return values


KeptFractions = Annotated[list[Annotated[float, AllowInfNan()]], AfterValidator(check_fractions)]
"""NaN and infinity are left to the check, whose message gives the range."""


def check_names(names: list[str], known: Collection[str], own: str) -> list[str]:
    """Refuse names that are unknown, occur twice, or belong in `own`, the key for the user's files."""
    for name in names:
        if name not in known:
            raise refusal(name, _instead(name, own) or join(known), problem=UNKNOWN)
    if len(set(names)) < len(names):
        raise refusal(names, f"{join(known)}, each once")
    return names


def _instead(name: str, own: str) -> str:
    """What to write for the dotted name or path of the user's own file; empty for any other name."""
    path = name.partition(":")[0].removesuffix(".py").replace(".", "/")
    return f"{own}: [{path}] for a file of your own" if own and "/" in path else ""
