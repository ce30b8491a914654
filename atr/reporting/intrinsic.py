"""What is measured beside the answers, where it was: selection without a language model, and its cost."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atr.core.files import plain_name
from atr.reporting.results import number, read

Line = list[float]
"""A value for each kept fraction."""


@dataclass(frozen=True)
class Selection:
    """What one reducer keeps, judged by its tokens alone; each a value for every kept fraction.

    The two reconstructions are unexplained variances of the features, 0 where all is restored: of the
    reconstructor trained with the selector, and of one trained on random masks.
    """

    reconstruction: Line
    reconstruction_random: Line
    text_coverage: Line | None
    """Fraction of the written characters whose centre lies in a kept token's patch; None where nothing is
    known to be written, or tokens are merged."""


@dataclass(frozen=True)
class Overlap:
    """Intersection over union of what each two reducers keep, a matrix in the order of `names`."""

    keep: float
    names: list[str]
    iou: list[Line]


@dataclass(frozen=True)
class Stability:
    """Mean intersection over union of what selectors of different training seeds keep, by kept fraction."""

    keep: Line
    seeds: int
    iou: Line


@dataclass(frozen=True)
class Measure:
    """Selection without a language model: experiments/intrinsic/metrics.json."""

    keep: Line
    reducers: dict[str, Selection]
    overlap: Overlap
    stability: Stability | None
    parameters: dict[str, Any]
    provenance: dict[str, Any]
    resolved: dict[str, Any]


@dataclass(frozen=True)
class Spent:
    """Median milliseconds an image that a reducer takes to keep `kept` of `tokens`, in batches of `batch`."""

    reducer: str
    tokens: int
    kept: int
    batch: int
    milliseconds: float


@dataclass(frozen=True)
class Prefill:
    """Median milliseconds an image that the language model's prefill takes with `tokens` visual ones."""

    tokens: int
    batch: int
    milliseconds: float


@dataclass(frozen=True)
class Cost:
    """Time that selection takes and prefill saves: experiments/latency/metrics.json."""

    device: str
    entries: list[Spent]
    prefill: list[Prefill]
    parameters: dict[str, Any]
    provenance: dict[str, Any]
    resolved: dict[str, Any]

    def saved(self, entry: Spent) -> float | None:
        """Milliseconds of prefill that the tokens left out would take, None where it was not measured."""
        times = {(each.tokens, each.batch): each.milliseconds for each in self.prefill}
        whole, short = (times.get((tokens, entry.batch)) for tokens in (entry.tokens, entry.kept))
        return None if whole is None or short is None else whole - short


def load_intrinsic(path: Path) -> Measure | None:
    """Read what stage measure wrote, None where there is no such file.

    Raises ValueError naming the file and what is wrong: a key that lacks or is unknown, or a list that does
    not hold one value for each kept fraction, or for each pair of names.
    """
    if not path.is_file():
        return None
    content = read(path, "measure")
    try:
        measure = Measure(**content | _parts(content))
        for name in (*measure.reducers, *measure.overlap.names):
            plain_name(name)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}; stage measure makes it") from None
    for name, values, wanted in _lists(measure):
        if len(values) != len(wanted):
            raise ValueError(
                f"{path}: {name} has {len(values)} values, allowed: {len(wanted)}; stage measure makes it"
            )
        for value in values:
            number(f"{path}: {name}", value)
    return measure


def load_latency(path: Path) -> Cost | None:
    """Read what stage cost wrote, None where there is no such file.

    Raises ValueError naming the file and the key that lacks or is unknown.
    """
    if not path.is_file():
        return None
    content = read(path, "cost")
    try:
        entries = [Spent(**entry) for entry in content["entries"]]
        prefill = [Prefill(**entry) for entry in content["prefill"]]
        for spent in (*entries, *prefill):
            for key, value in vars(spent).items():
                plain_name(value) if key == "reducer" else number(key, value)
        return Cost(**content | {"entries": entries, "prefill": prefill, "device": str(content["device"])})
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}; stage cost makes it") from None


def _parts(content: dict[str, Any]) -> dict[str, Any]:
    stability = content["stability"]
    return {
        "reducers": {name: Selection(**values) for name, values in content["reducers"].items()},
        "overlap": Overlap(**content["overlap"]),
        "stability": None if stability is None else Stability(**stability),
    }


def _lists(measure: Measure) -> Iterator[tuple[str, Line, Sequence[object]]]:
    """Each list by its name in the file, with the list that it must be as long as."""
    for name, selection in measure.reducers.items():
        for key, values in vars(selection).items():
            if values is not None:
                yield f"reducers.{name}.{key}", values, measure.keep
    overlap, stability = measure.overlap, measure.stability
    yield "keep", measure.keep, measure.keep
    yield "overlap.iou", [len(line) for line in overlap.iou], overlap.names
    for name, line in zip(overlap.names, overlap.iou, strict=False):
        yield f"overlap.iou of {name}", line, overlap.names
    if stability:
        yield "stability.keep", stability.keep, stability.keep
        yield "stability.iou", stability.iou, stability.keep
