"""The parts that a name in params.yaml can choose, and what can be said of each without importing it.

A part is one Python file: a reducer, a benchmark. Its name is the file's, and what parameters must be checked
against stands at its top in plain constants, which are read and not run: params.yaml is checked before any
heavy import, and a new part is a new file, with no list elsewhere to be added to.
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


@dataclass(frozen=True)
class ReducerTraits:
    """What is known of a reducer before it is imported; each field is a constant of its file, in capitals."""

    budget: str = "asked"
    """How many tokens it keeps: as many as `asked`, `all`, `nothing`, or a count of its `own` for each image."""
    draws: bool = False
    """Whether it is random, and is evaluated under several seeds."""
    one_tile: bool = False
    """Whether it serves only models that read images whole."""
    weights: str = ""
    """The stage whose selector it is made of: `pretrain` or `distill`; none needs none."""


def names(folder: Path) -> list[str]:
    """The parts of a folder by name, in alphabetical order."""
    return sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("_"))


@cache
def constants(path: Path) -> dict[str, Any]:
    """The literals that a Python file assigns to capitals at its top level; the file is not run.

    Raises OSError or SyntaxError for a file that cannot be read or parsed.
    """
    found: dict[str, Any] = {}
    for name, value in _assigned(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        try:
            found[name] = ast.literal_eval(value)
        except ValueError:
            continue  # computed, and so no constant
    return found


def _assigned(tree: ast.Module) -> Iterator[tuple[str, ast.expr]]:
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


def reducer_file(name: str) -> Path:
    """The file of a reducer: one of ours by its name, or the user's own by its path without `.py`."""
    for folder in (PEERS, TRAINED):
        if name in names(folder):
            return folder / f"{name}.py"
    return Path(f"{name}.py")


def reducer_traits(name: str) -> ReducerTraits:
    """What the file of a reducer says of it; errors as in `constants`."""
    found = constants(reducer_file(name))
    known = {key: found[key.upper()] for key in ReducerTraits.__dataclass_fields__ if key.upper() in found}
    return ReducerTraits(**known)
