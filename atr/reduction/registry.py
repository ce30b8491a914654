"""Reducers built by name: a file of `peers` or `trained`, or a Python file of the user's project.

Only the file of the requested reducer is imported. A user's file has `build(seed=0)`, or exactly one class
that is a reducer, built without argument, or from the seed if the file has DRAWS = True. With a constant
WEIGHTS, function or class take the trained selector instead.
"""

import importlib
import sys
from collections.abc import Callable
from dataclasses import fields
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from atr.core import catalog
from atr.reduction.base import EncoderOutput, Reducer
from atr.reduction.layer_schedule import LEFT_OUT, LayerReducer
from atr.reduction.selector import FeatureSelector

OPTIONAL_FIELDS = frozenset(field.name for field in fields(EncoderOutput)) - {"features_BND"}
"""What a reducer may name in `needs`."""


def build_reducer(
    name: str, seed: int = 0, selector: str | Path | FeatureSelector | None = None
) -> Reducer | LayerReducer:
    """A reducer by its name, or a user's by its file's path without `.py`.

    `selector` is the folder or hub id of the weights for a reducer that has WEIGHTS, or the selector itself;
    it is ignored by all others. Raises a one-line ValueError naming the file if there is no such file, it
    cannot be imported, it has no reducer or several, or it builds something else; and as
    `FeatureSelector.from_pretrained` does.
    """
    return build_from(catalog.reducer_file(name), name, seed, selector)


def build_from(
    file: Path,
    name: str,
    seed: int = 0,
    selector: str | Path | FeatureSelector | None = None,
    class_name: str | None = None,
) -> Reducer | LayerReducer:
    """As `build_reducer`, from a file, and from its class `class_name` if one is given."""
    if not file.is_file():
        raise ValueError(
            f"reducer {name!r}: there is no file {file}, allowed: the path of a Python file in the project "
            f"without .py, or one of {', '.join(built_in_names())}"
        )
    build = _builder(_module(file.resolve(), file), file, class_name)
    traits = catalog.reducer_traits(str(file.with_suffix("")))
    if traits.weights:
        return _built(build, file, _loaded(selector, name))
    takes_seed = not isinstance(build, type) or traits.draws
    return _built(build, file, *([seed] if takes_seed else []))


def built_in_names() -> list[str]:
    """Names of all reducers in `peers` and `trained`."""
    return catalog.names(catalog.PEERS) + catalog.names(catalog.TRAINED)


def placeholder() -> FeatureSelector:
    """The smallest selector, in place of a trained one, to read what a reducer built from one needs."""
    return FeatureSelector(width=4, grid=(1, 1), layers=0, heads=1)


def why_not_selecting(name: str) -> str:
    """Why a reducer selects no tokens before the language model; empty if it does. Loads no weights."""
    return LEFT_OUT if isinstance(build_reducer(name, 0, placeholder()), LayerReducer) else ""


def _loaded(selector: str | Path | FeatureSelector | None, name: str) -> FeatureSelector:
    if selector is None:
        raise ValueError(f"reducer {name}: it is built from a trained selector, and none is given")
    return selector if isinstance(selector, FeatureSelector) else FeatureSelector.from_pretrained(selector)


@cache
def _module(path: Path, file: Path) -> ModuleType:
    """Import a file under its dotted name relative to the project root, which is the current folder.

    `path` is the absolute path, `file` the path that errors show.
    """
    dotted, root = _dotted(path, file)
    if not dotted.startswith("atr.") and root not in sys.path:
        sys.path.insert(0, root)
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(dotted)
    except (Exception, SystemExit) as error:  # a user's file may raise anything
        raise ValueError(f"{file}: it cannot be imported: {_one_line(error)}") from error
    if Path(str(module.__file__)).resolve() != path:
        raise ValueError(f"{file}: another module has the name {dotted}, {module.__file__}: rename the file")
    return module


def _dotted(path: Path, file: Path) -> tuple[str, str]:
    """The module name of a file, and the folder that the name starts from."""
    package = catalog.PACKAGE.resolve()
    root = package.parent if path.is_relative_to(package) else Path.cwd().resolve()
    if not path.is_relative_to(root):
        root = path.parent
    parts = path.relative_to(root).with_suffix("").parts
    if not all(part.isidentifier() for part in parts):
        raise ValueError(f"{file}: this path cannot be imported, allowed: letters, digits, _ in each part")
    return ".".join(parts), str(root)


def _builder(module: ModuleType, file: Path, class_name: str | None) -> Callable[..., Any]:
    if class_name is not None:
        kind = getattr(module, class_name, None)
        if not isinstance(kind, type):
            raise ValueError(f"{file}: it has no class {class_name}")
        return kind
    if callable(build := getattr(module, "build", None)):
        return build  # type: ignore[no-any-return]
    kinds = [kind for kind in vars(module).values() if _is_reducer_class(kind, module)]
    if len(kinds) != 1:
        names = ", ".join(kind.__name__ for kind in kinds) or "none"
        raise ValueError(
            f"{file}: it has {len(kinds)} reducers ({names}), allowed: a function build(seed=0), or one "
            "class with `needs` and `__call__(encoded, budget)`"
        )
    return kinds[0]  # type: ignore[no-any-return]


def _is_reducer_class(kind: object, module: ModuleType) -> bool:
    if not isinstance(kind, type) or kind.__module__ != module.__name__ or kind.__name__.startswith("_"):
        return False
    members = {name for base in kind.__mro__ for name in vars(base)}
    return "needs" in members and not members.isdisjoint({"__call__", "schedule"})


def _built(build: Callable[..., Any], file: Path, *arguments: Any) -> Reducer | LayerReducer:
    try:
        reducer = build(*arguments)
        needs = getattr(reducer, "needs", None)
    except (Exception, SystemExit) as error:  # a user's code may raise anything
        raise ValueError(f"{file}: {build.__name__} raised {_one_line(error)}") from error
    if not isinstance(needs, frozenset) or not (callable(reducer) or isinstance(reducer, LayerReducer)):
        raise ValueError(
            f"{file}: {build.__name__} returns a {type(reducer).__name__}, which is no reducer, "
            "allowed: an object with a frozenset `needs` and `__call__(encoded, budget)`"
        )
    if unknown := sorted(map(str, needs - OPTIONAL_FIELDS)):
        raise ValueError(
            f"{file}: needs: {unknown[0]!r} is unknown, allowed: {', '.join(sorted(OPTIONAL_FIELDS))}"
        )
    return reducer  # type: ignore[no-any-return]


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
