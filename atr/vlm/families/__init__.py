"""Model families by name: how each one cuts images into tiles and packs the tokens of the tiles.

The LLaVA families have a file each, with an object FAMILY. Any other model type of transformers is served by
the rule (`atr.vlm.families.rule`), if it stands in the table or has passed `atr check-family`. A user's
family is an entry point of the group `atr.families`: its name is the model type, its value an object with the
methods of `Family`. Families are imported at first use, so that none depends on another.
"""

from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from atr.vlm.families.base import Family, Layer, Tiling
from atr.vlm.families.checked import checked_types
from atr.vlm.families.rule import Rule, why_not_served
from atr.vlm.families.table import CHECKED, TABLE

__all__ = ["OWN_TYPES", "Family", "Layer", "Tiling", "family_named", "family_of", "supported_types"]

_GROUP = "atr.families"
OWN_TYPES = {
    "llava": "llava",
    "llava_next": "llava_next",
    "llava_next_video": "llava_next",
    "llava_onevision": "llava_onevision",
}
"""Model types with a file of their own: their features are packed with newlines, or stay as they are."""


def family_of(model: Any) -> Family:
    """The family of a model; errors as in `family_named`, and for a model that lacks what the rule needs."""
    family = family_named(model.config.model_type)
    if isinstance(family, Rule) and (reason := why_not_served(model)):
        raise ValueError(f"model type {model.config.model_type!r} is not supported: {reason}")
    return family


@cache
def family_named(model_type: str) -> Family:
    """The family of a model type.

    Raises ValueError, one line, for a type that is not supported, for an entry point that cannot be imported
    or lacks a member of `Family`, and for one with the name of another family.
    """
    is_built_in, added = model_type in _built_in(), list(entry_points(group=_GROUP, name=model_type))
    if len(added) + is_built_in > 1:
        other = "a built-in family" if is_built_in else _describe(added[0])
        raise ValueError(f"{_describe(added[-1])} has the name of {other}, allowed: a name of its own")
    if added:
        return _load(added[0])
    if not is_built_in and model_type in checked_types():
        return Rule(CHECKED)
    if not is_built_in:
        allowed = ", ".join(supported_types())
        raise ValueError(f"model type {model_type!r} is not supported, allowed: {allowed}")
    if model_type in TABLE:
        return Rule(TABLE[model_type])
    family: Family = import_module(f"{__name__}.{OWN_TYPES[model_type]}").FAMILY
    return family


def supported_types() -> list[str]:
    """The model types that have a family, built-in ones first."""
    added = {entry_point.name for entry_point in entry_points(group=_GROUP)}
    return [*_built_in(), *sorted(added - set(_built_in()))]


def _built_in() -> list[str]:
    return [*OWN_TYPES, *sorted(TABLE)]


def _describe(added: EntryPoint) -> str:
    return f"entry point {added.name} of {_GROUP} ({added.value})"


def _load(added: EntryPoint) -> Family:
    try:
        family: Family = added.load()
    except Exception as error:  # a user's module may raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{_describe(added)} cannot be imported: {reason}") from error
    if isinstance(family, type):
        raise ValueError(f"{_describe(added)} is a class, allowed: an object")
    for method in ("image_keys", "tiling", "encode", "pack", "tokens", "project"):
        if not callable(getattr(family, method, None)):
            raise ValueError(f"{_describe(added)} lacks the method {method}")
    return family
