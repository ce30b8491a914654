"""Reads the times of selection and prefill that stages latency and prefill measured."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from atr.core.typed_json import short
from atr.reporting.cells import (
    Provenance,
    Sourced,
    cell_path,
    check_agreement,
    conditions_of,
    read_cells,
    read_result,
)


@dataclass(frozen=True)
class SelectionTime:
    """Median milliseconds per image that a reducer takes to keep `kept` of `tokens`, at one batch size."""

    reducer: str
    tokens: int
    kept: int
    batch: int
    milliseconds: float


@dataclass(frozen=True)
class PrefillTime:
    """Median milliseconds per image of the language model's prefill with `tokens` visual tokens."""

    tokens: int
    batch: int
    milliseconds: float


@dataclass(frozen=True)
class LatencyCell:
    """One file of stage latency: experiments/latency/<reducer>/metrics.json."""

    reducer: str
    device: str
    entries: list[SelectionTime]
    left_out: str
    parameters: dict[str, Any]
    provenance: Provenance
    resolved: dict[str, Any]

    def __post_init__(self) -> None:
        for entry in self.entries:
            if entry.reducer != self.reducer:
                allowed = f"allowed: {self.reducer}"
                raise ValueError(f"entries: reducer {short(entry.reducer)} is not allowed, {allowed}")


@dataclass(frozen=True)
class PrefillCell:
    """The file of stage prefill: experiments/latency/prefill/metrics.json."""

    device: str
    prefill: list[PrefillTime]
    parameters: dict[str, Any]
    provenance: Provenance
    resolved: dict[str, Any]


@dataclass(frozen=True)
class LatencyResults:
    """The time that selection takes, and the prefill time that it saves."""

    device: str
    entries: list[SelectionTime]
    prefill: list[PrefillTime]
    sources: dict[str, Sourced] = field(default_factory=dict)
    """The files by stage and reducer."""

    def prefill_saved(self, entry: SelectionTime) -> float | None:
        """Milliseconds per image by which fewer tokens shorten the prefill; None if it was not measured."""
        times = {(time.tokens, time.batch): time.milliseconds for time in self.prefill}
        whole, reduced = (times.get((tokens, entry.batch)) for tokens in (entry.tokens, entry.kept))
        return None if whole is None or reduced is None else whole - reduced


def load_latency(folder: Path, reducers: Sequence[str]) -> LatencyResults | None:
    """Read the cells of these reducers and the prefill times; None if no reducer has been timed.

    A missing cell is left out; without the prefill file no time is saved. Raises ValueError naming the file
    and the key if one is broken, or if two were measured on different devices or with different parameters.
    """
    cells = read_cells(LatencyCell, folder, "latency", reducers)
    if not cells:
        return None
    first, path = next(iter(cells.values())), cell_path(folder, "prefill")
    check_agreement({cell_path(folder, name): _conditions(cell) for name, cell in cells.items()}, "latency")
    sources: dict[str, Sourced] = {f"latency {name}": cell for name, cell in cells.items()}
    prefill: list[PrefillTime] = []
    if path.is_file():
        sources["prefill"] = times = read_result(PrefillCell, path, "prefill")
        prefill = times.prefill
        selection, conditions = _conditions(first), _conditions(times)
        shared = selection.keys() & conditions.keys()  # the prefill depends on fewer parameters
        pair = {cell_path(folder, first.reducer): selection, path: conditions}
        check_agreement({key: {name: part[name] for name in shared} for key, part in pair.items()}, "prefill")
    entries = [entry for cell in cells.values() for entry in cell.entries]
    return LatencyResults(first.device, entries, prefill, sources)


def _conditions(cell: LatencyCell | PrefillCell) -> dict[str, Any]:
    return {"device": cell.device} | conditions_of(cell)
