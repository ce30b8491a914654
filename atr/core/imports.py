"""Finds the files that run when a Python module does: its own, and those it imports from the same root.

Imports inside functions count, those under `if TYPE_CHECKING` do not. A module that is loaded by name (a
reducer, a benchmark, a model family) is not an import and is not found.
"""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
"""The folder that holds the package atr."""


def reached_files(path: Path, root: Path = ROOT) -> set[Path]:
    """All files under `root` that run when `path` does, with the __init__.py of their packages."""
    reached: set[Path] = set()
    todo = {path.resolve()}
    while todo:
        file = todo.pop()
        reached.add(file)
        todo |= (_imported(file, root.resolve()) | set(_packages(file, root.resolve()))) - reached
    return reached


def imported_names(path: Path) -> frozenset[str]:
    """Dotted names that a file imports when it runs: modules, and the names imported from them."""
    return frozenset(_names(ast.parse(path.read_text(encoding="utf-8"), str(path))))


@cache
def _imported(path: Path, root: Path) -> frozenset[Path]:
    files = (_file(name, root) for name in imported_names(path))
    return frozenset(file for file in files if file)


def _names(tree: ast.AST) -> Iterator[str]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        yield from _names(node)


def _file(name: str, root: Path) -> Path | None:
    """The file of a module under `root`; None for any other name."""
    path = root.joinpath(*name.split("."))
    for file in (path / "__init__.py", path.with_suffix(".py")):
        if file.is_file():
            return file
    return None


def _packages(path: Path, root: Path) -> Iterator[Path]:
    for folder in path.parents:
        if folder == root or root not in folder.parents:
            return
        if (folder / "__init__.py").is_file():
            yield folder / "__init__.py"
