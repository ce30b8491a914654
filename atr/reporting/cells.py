"""Reads the JSON files of the stages as typed records, and checks that they belong together."""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from atr.core.files import read_json
from atr.core.typed_json import parse_record, short

MACHINE_KEYS = ("device", "processor")
"""Keys of `resolved` in which comparable results may differ: they change only the rounding."""
_REDUCER_LISTS = ("reducers", "selectors", "distilled", "own")
"""Keys of the section `evaluate` that name reducers; no reducer's result depends on the others."""

_PART_NAME = re.compile(r"[\w-]+(/[\w-]+)*", re.ASCII)


@dataclass(frozen=True)
class Provenance:
    """Git commit (None outside a repository) and versions of the libraries that a stage ran with."""

    commit: str | None
    versions: dict[str, str]


class Sourced(Protocol):
    """A result that records how it was computed."""

    @property
    def parameters(self) -> dict[str, Any]:
        """The sections of params.yaml that the stage read."""

    @property
    def provenance(self) -> Provenance:
        """The code and libraries of the run."""

    @property
    def resolved(self) -> dict[str, Any]:
        """How the run computed: precision, device, processor, versions of models and features."""


@dataclass(frozen=True)
class _Header:
    """What the cells of all stages have in common."""

    reducer: str
    left_out: str


Result = TypeVar("Result")


def read_object(path: Path, stage: str) -> dict[str, Any]:
    """The JSON object in a file; raises ValueError naming the file and the stage that writes it."""
    with naming_stage(stage):
        content = read_json(path)
        if not isinstance(content, dict):
            raise ValueError(f"{path}: {short(content)} is not allowed, allowed: a JSON object")
    return content


def read_result(kind: type[Result], path: Path, stage: str) -> Result:
    """A file as a dataclass, with exactly its keys; raises ValueError naming file, key and stage."""
    content = read_object(path, stage)
    with naming_stage(stage):
        return parse_record(kind, content, str(path), exact=True)


def read_cells(kind: type[Result], folder: Path, stage: str, reducers: Iterable[str]) -> dict[str, Result]:
    """The results of a stage for each reducer that has any, in the order of `reducers`.

    A reducer has none if `folder` lacks its metrics.json, or if that file says why it was left out.
    Raises ValueError naming file, key and stage.
    """
    cells = {}
    for reducer in reducers:
        path = cell_path(folder, reducer)
        if path.is_file() and not _left_out(path, stage, reducer):
            cells[reducer] = read_result(kind, path, f"{stage} (reducer {reducer})")
    return cells


def cell_path(folder: Path, reducer: str) -> Path:
    """The file in which a stage writes the results of one reducer."""
    return folder / reducer / "metrics.json"


def check_agreement(conditions: Mapping[Path, dict[str, Any]], stage: str) -> None:
    """Raise ValueError if a file differs from the first one in a condition, given by key."""
    (first, expected), *others = conditions.items() or [(Path(), {})]
    for path, values in others:
        for key in expected | values:
            value, allowed = values.get(key), expected.get(key)
            if value != allowed:
                message = (
                    f"{path}: {key}: {short(value)} is not allowed, allowed: {short(allowed)}, as in {first}"
                )
                raise ValueError(f"{message}; run stage {stage} for both")


def conditions_of(result: Sourced) -> dict[str, Any]:
    """What two results must share to stand in one table, by dotted key: parameters, and `resolved`.

    The section `trainer` may differ, because `resolved` records its effect.
    """
    parameters = flatten({key: value for key, value in result.parameters.items() if key != "trainer"})
    reducers = {f"evaluate.{key}" for key in _REDUCER_LISTS}
    shared = {key: value for key, value in parameters.items() if key not in reducers}
    return shared | resolved_conditions(result.resolved)


def resolved_conditions(resolved: dict[str, Any]) -> dict[str, Any]:
    """`resolved` without the machine, by dotted key."""
    return {f"resolved.{key}": value for key, value in flatten(resolved).items() if key not in MACHINE_KEYS}


def part_name(name: str) -> str:
    """Check the name of a benchmark: that of its file, or the path of a user's own file without `.py`.

    Figures are named after it. Raises ValueError for a name that could lead out of their folder.
    """
    if not _PART_NAME.fullmatch(name) or len(name) > 64:
        allowed = "at most 64 letters, digits, hyphens and underscores, folders joined by /"
        raise ValueError(f"{short(name)} is no name, allowed: {allowed}")
    return name


def flatten(nested: dict[str, Any], prefix: str = "", separator: str = ".") -> dict[str, Any]:
    """Values of nested dicts by the joined keys of all levels."""
    values: dict[str, Any] = {}
    for key, value in nested.items():
        name = f"{prefix}{key}"
        values |= (
            flatten(value, f"{name}{separator}", separator) if isinstance(value, dict) else {name: value}
        )
    return values


@contextmanager
def naming_stage(stage: str) -> Iterator[None]:
    """Add the stage that writes a file to a ValueError about it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{error}; stage {stage} writes it") from None


def _left_out(path: Path, stage: str, reducer: str) -> str:
    content = read_object(path, f"{stage} (reducer {reducer})")
    with naming_stage(f"{stage} (reducer {reducer})"):
        header = parse_record(_Header, content, str(path))
        if header.reducer != reducer:
            raise ValueError(f"{path}: reducer: {short(header.reducer)} is not allowed, allowed: {reducer}")
    return header.left_out
