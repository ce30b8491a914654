"""Finds reducers and benchmarks by name and reads their traits without importing them.

Each is one Python file and bears the file's name. Its traits are plain constants at the top of the file. They
are parsed, not run, so that params.yaml is checked before any heavy import. To add a reducer or benchmark,
add a file; there is no list to edit.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parents[1]
PEERS = PACKAGE / "reduction" / "peers"
"""Reducers that need no training."""
TRAINED = PACKAGE / "reduction" / "trained"
"""Reducers made of a trained selector."""
BENCHMARKS = PACKAGE / "benchmarks"
GROUPS = ("text", "general")
"""The groups of benchmarks: the paper plots text-based and general tasks separately."""


@dataclass(frozen=True)
class ReducerTraits:
    """What is known of a reducer before it is imported; fields are constants in capitals in its file."""

    budget: str = "asked"
    """How many tokens it keeps: the number `asked` for, `all`, `nothing`, or a number of its `own` per
    image."""
    draws: bool = False
    """Whether it is random and so evaluated under several seeds."""
    one_tile: bool = False
    """Whether it serves only models that read images whole, because it merges tokens, or depends on token
    positions without giving scores that are comparable between tiles."""
    weights: str = ""
    """The stage whose selector it is made of: `pretrain`, `distill`, or empty if it needs none."""
    needs: tuple[str, ...] = ()
    """The optional fields of `atr.reduction.base.EncoderOutput` that it reads."""
    merges: bool = False
    """Whether it replaces the kept tokens by new ones, each made from several."""
    inside_llm: bool = False
    """Whether it removes tokens between the layers of the language model."""


def names(folder: Path) -> list[str]:
    """Names of a folder's reducers or benchmarks, in alphabetical order."""
    return sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("_"))


def constants(path: Path) -> dict[str, Any]:
    """The literals assigned to names in capitals at the top level of a Python file, which is not run.

    Raises ValueError, one line naming the file, if it cannot be read or parsed.
    """
    try:
        return _constants(path.absolute(), path.stat().st_mtime_ns)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except SyntaxError as error:
        raise ValueError(f"{path} line {error.lineno}: {error.msg}") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from None


@cache
def _constants(path: Path, modified: int) -> dict[str, Any]:
    literals: dict[str, Any] = {}
    for name, value in _assignments(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        try:
            literals[name] = ast.literal_eval(value)
        except ValueError:
            continue  # computed, not a literal
    return literals


def _assignments(tree: ast.Module) -> Iterator[tuple[str, ast.expr]]:
    for node in tree.body:
        if isinstance(node, ast.Assign):
            targets: list[ast.expr] = node.targets
        elif isinstance(node, ast.AnnAssign):
            targets = [node.target]
        else:
            continue
        for target in targets:
            if isinstance(target, ast.Name) and target.id.isupper() and node.value is not None:
                yield target.id, node.value


def untrained() -> list[str]:
    """The reducers that need no training; full, none and random, which the report refers to, come first."""
    first = ["full", "none", "random"]
    return [*first, *(name for name in names(PEERS) if name not in first)]


def trained(stage: str = "") -> list[str]:
    """The reducers made of the selector of stage `pretrain` or `distill`; of both if no stage is given."""
    return [name for name in names(TRAINED) if stage in ("", reducer_traits(name).weights)]


def reducers() -> list[str]:
    """All reducers of the package."""
    return [*untrained(), *trained("pretrain"), *trained("distill")]


def reducer_file(name: str) -> Path:
    """The file of a reducer: one of the package by its name, or the user's own by its path without `.py`."""
    for folder in (PEERS, TRAINED):
        if name in names(folder):
            return folder / f"{name}.py"
    return Path(f"{name}.py")


def reducer_traits(name: str) -> ReducerTraits:
    """The traits of a reducer, one of the package or the user's own.

    Raises ValueError as `constants` does, and for a trait that is not allowed.
    """
    path = reducer_file(name)
    literals = constants(path)
    traits = {key: literals[key.upper()] for key in _TRAITS if key.upper() in literals}
    for key, value in traits.items():
        for item in _items(path, value) if key == "needs" else [value]:
            _check(path, key.upper(), item, _TRAITS[key])
    return ReducerTraits(**traits)


_TRAITS: dict[str, tuple[object, ...]] = {
    "budget": ("asked", "all", "nothing", "own"),
    "draws": (False, True),
    "one_tile": (False, True),
    "weights": ("", "pretrain", "distill"),
    "needs": (
        "attention_BN",
        "encode",
        "first_attention_BN",
        "grid",
        "image_key_BX",
        "keys_BND",
        "pixels_BCHW",
        "projected_BND",
        "text_BD",
    ),
    "merges": (False, True),
    "inside_llm": (False, True),
}


def _items(path: Path, needs: object) -> tuple[object, ...]:
    if not isinstance(needs, tuple):
        raise ValueError(f"{path}: NEEDS: {needs!r} is not allowed, allowed: a tuple of names of fields")
    return needs


def _check(path: Path, key: str, value: object, allowed: tuple[object, ...]) -> None:
    if not any(type(value) is type(choice) and value == choice for choice in allowed):
        choices = ", ".join(repr(choice) for choice in allowed)
        raise ValueError(f"{path}: {key}: {value!r} is unknown, allowed: {choices}")


@cache
def benchmarks() -> dict[str, str]:
    """The group of each benchmark (file of atr/benchmarks with a GROUP); text-based ones come first."""
    groups = {name: constants(BENCHMARKS / f"{name}.py").get("GROUP") for name in names(BENCHMARKS)}
    return {name: group for group in GROUPS for name in groups if groups[name] == group}


def benchmark_group(name: str) -> str:
    """The group of a benchmark, one of the package by its name or the user's own by its path without `.py`.

    Raises ValueError, one line, if there is no such file or it has no GROUP.
    """
    is_own = "/" in name or not (BENCHMARKS / f"{name}.py").is_file()
    path = Path(f"{name}.py") if is_own else BENCHMARKS / f"{name}.py"
    group = constants(path).get("GROUP")
    _check(path, "GROUP", group, GROUPS)
    return str(group)
