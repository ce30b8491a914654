"""Reads how selections and answers change if deployment differs from training, from stage robustness."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from atr.core.typed_json import short
from atr.reporting.cells import Provenance, cell_path, check_agreement, conditions_of, read_cells


@dataclass(frozen=True)
class MaskOverlap:
    """IoU of the tokens kept of an image: the mean over images, and the lowest."""

    mean: float
    lowest: float


@dataclass(frozen=True)
class ScoreChange:
    """Rise of the mean score over the benchmarks, in -1..1, with its paired 95 % interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class ReducerChanges:
    """What a deployment changes for one reducer; each a value for every kept fraction."""

    iou: list[MaskOverlap | None]
    """On the images of the questions; None if no image has the same number of tokens as in the reference."""
    photographs: list[MaskOverlap | None]
    """The same on photographs larger than the tower's input, on which a resize shows."""
    change: list[ScoreChange]


@dataclass(frozen=True)
class VariantChanges:
    """One deviation from the reference deployment, and what it changes."""

    name: str
    no_pixel_changed: bool
    """Whether the variant concerns images but leaves those of the questions unchanged."""
    full: ScoreChange | None
    """With all tokens; None if the reducer `full` was not measured."""
    reducers: dict[str, ReducerChanges]


@dataclass(frozen=True)
class RobustnessCell:
    """One file of stage robustness: experiments/robustness/<reducer>/metrics.json.

    The file of `full` has the scores with all tokens; the other files have one reducer each.
    """

    reducer: str
    keep: list[float]
    questions: int
    photographs: int
    full: float | None
    reference: dict[str, list[float]]
    """Mean score in the reference deployment, by kept fraction."""
    variants: list[VariantChanges]
    left_out: str
    parameters: dict[str, Any]
    provenance: Provenance
    resolved: dict[str, Any]

    def __post_init__(self) -> None:
        expected = [] if self.reducer == "full" else [self.reducer]
        for key, names in _reducer_names(self):
            if names != expected:
                raise ValueError(f"{key}: {short(names)} is not allowed, allowed: {short(expected)}")
        for key, values in _value_lists(self):
            if len(values) != len(self.keep):
                raise ValueError(f"{key}: {len(values)} values, allowed: {len(self.keep)}")
        if self.reducer == "full" and None in (self.full, *(variant.full for variant in self.variants)):
            raise ValueError("full: None is not allowed, allowed: a score, and its change under each variant")


@dataclass(frozen=True)
class RobustnessResults:
    """Changes of all reducers under every variant of the deployment."""

    keep: list[float]
    questions: int
    photographs: int
    full: float | None
    """Mean score with all tokens; None if the reducer `full` was not measured."""
    reference: dict[str, list[float]]
    variants: list[VariantChanges]
    cells: dict[str, RobustnessCell] = field(default_factory=dict)


def load_robustness(folder: Path, reducers: Sequence[str]) -> RobustnessResults | None:
    """Read and merge the cells of these reducers; None if there is none but `full`.

    A missing cell is left out. Raises ValueError naming the file and the key if a cell is broken, or if two
    were measured at different kept fractions, on other questions, under other variants or parameters.
    """
    cells = read_cells(RobustnessCell, folder, "robustness", reducers)
    if not set(cells) - {"full"}:
        return None
    conditions = {cell_path(folder, name): _conditions(cell) for name, cell in cells.items()}
    check_agreement(conditions, "robustness")
    first, full = next(iter(cells.values())), cells.get("full")
    return RobustnessResults(
        keep=first.keep,
        questions=first.questions,
        photographs=first.photographs,
        full=full.full if full else None,
        reference={name: line for cell in cells.values() for name, line in cell.reference.items()},
        variants=[_merged(list(cells.values()), place) for place in range(len(first.variants))],
        cells=cells,
    )


def _merged(cells: Sequence[RobustnessCell], place: int) -> VariantChanges:
    """The changes of all reducers under one variant."""
    parts = [cell.variants[place] for cell in cells]
    return VariantChanges(
        name=parts[0].name,
        no_pixel_changed=parts[0].no_pixel_changed,
        full=next(
            (part.full for cell, part in zip(cells, parts, strict=True) if cell.reducer == "full"), None
        ),
        reducers={name: changes for part in parts for name, changes in part.reducers.items()},
    )


def _conditions(cell: RobustnessCell) -> dict[str, Any]:
    shared = {key: getattr(cell, key) for key in ("keep", "questions", "photographs")}
    variants = {
        "variants": [variant.name for variant in cell.variants],
        "no_pixel_changed": [variant.no_pixel_changed for variant in cell.variants],
    }
    return shared | variants | conditions_of(cell)


def _reducer_names(cell: RobustnessCell) -> Iterator[tuple[str, list[str]]]:
    """The names of the reducers at each place of the file."""
    yield "reference", list(cell.reference)
    for variant in cell.variants:
        yield f"variants.{variant.name}.reducers", list(variant.reducers)


def _value_lists(cell: RobustnessCell) -> Iterator[tuple[str, list[Any]]]:
    """The lists by kept fraction, each with its place in the file."""
    for name, values in cell.reference.items():
        yield f"reference.{name}", values
    for variant in cell.variants:
        for name, changes in variant.reducers.items():
            for key, values in vars(changes).items():
                yield f"variants.{variant.name}.{name}.{key}", values
