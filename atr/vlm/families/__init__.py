"""Model families by name: how each one cuts images into tiles and packs the tokens of the tiles.

A built-in family is a file of this folder, named after `model.config.model_type`, that has an object FAMILY.
A user's family is an entry point of the group `atr.families`: its name is the model type, its value an object
with the methods of `Family`. Families are imported at first use, so that none depends on another.
"""

from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from atr.core import catalog
from atr.vlm.families.base import Family, Tiling, encode, project

__all__ = ["Family", "Tiling", "encode", "family_named", "family_of", "project", "supported_types"]

_GROUP = "atr.families"


def family_of(model: Any) -> Family:
    """The family of a model; errors as in `family_named`."""
    return family_named(model.config.model_type)


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
    if not is_built_in:
        allowed = ", ".join(supported_types())
        raise ValueError(f"model type {model_type!r} is not supported, allowed: {allowed}")
    family: Family = import_module(f"{__name__}.{model_type}").FAMILY
    return family


def supported_types() -> list[str]:
    """The model types that have a family, built-in ones first."""
    added = {entry_point.name for entry_point in entry_points(group=_GROUP)}
    return [*_built_in(), *sorted(added - set(_built_in()))]


def _built_in() -> list[str]:
    return [name for name in catalog.names(Path(__file__).parent) if name != "base"]


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
    for method in ("tiling", "pack"):
        if not callable(getattr(family, method, None)):
            raise ValueError(f"{_describe(added)} lacks the method {method}")
    if not isinstance(getattr(family, "image_keys", None), frozenset):
        raise ValueError(f"{_describe(added)} lacks image_keys, a frozenset of names")
    return family
