"""How stable selections and answers are where deployment differs from training: what was measured, shown."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from atr.core.files import plain_name
from atr.core.typed_json import parse_record
from atr.reporting.figures import Style, styles
from atr.reporting.results import made_by, read
from atr.reporting.style import RULE, png, theme
from atr.reporting.tables import MISSING, Table

ROBUSTNESS_NOTE = (
    "Each reducer against itself where deployment differs in one thing from the reference: the model's own "
    "processor (Pillow), its tower in float32 under sdpa, original positions. Overlap is the IoU of the kept "
    "tokens, a mean over images with the lowest in brackets. Points are those of the mean score over the "
    "benchmarks, with a paired 95 % interval over the questions; what changes with all tokens as well is not "
    "the selection's doing."
)
SAME = "no pixel changed"


@dataclass(frozen=True)
class Overlap:
    """Intersection over union of the tokens kept of an image: its mean over images, and the lowest."""

    mean: float
    lowest: float


@dataclass(frozen=True)
class Change:
    """By how much the mean score over the benchmarks rises, with its paired 95 % interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Line:
    """What changes of one reducer, for each kept fraction; None where no image can be compared."""

    iou: list[Overlap | None]
    photographs: list[Overlap | None]
    """The same on photographs larger than the tower's images, on which a resize shows."""
    change: list[Change]


@dataclass(frozen=True)
class Variant:
    """One difference of the deployment, and what it changes."""

    name: str
    no_pixel_changed: bool
    """It is about images, and leaves those of the questions as they are."""
    full: Change
    reducers: dict[str, Line]


@dataclass(frozen=True)
class Robustness:
    """Stability where deployment differs from training: experiments/robustness/metrics.json."""

    keep: list[float]
    questions: int
    photographs: int
    full: float
    reference: dict[str, list[float]]
    variants: list[Variant]
    parameters: dict[str, Any]
    provenance: dict[str, Any]
    resolved: dict[str, Any]

    def __post_init__(self) -> None:
        for name in self.reference:
            plain_name(name)
        for variant in self.variants:
            if list(variant.reducers) != list(self.reference):
                names = ", ".join(self.reference)
                raise ValueError(f"{variant.name}: reducers {', '.join(variant.reducers)}, allowed: {names}")
        for name, values in _lists(self):
            if len(values) != len(self.keep):
                raise ValueError(f"{name} has {len(values)} values, allowed: {len(self.keep)}")


def load_robustness(path: Path) -> Robustness | None:
    """Read what stage robustness wrote, None where there is no such file.

    Raises ValueError naming the file, the key and what is allowed.
    """
    if not path.is_file():
        return None
    content = read(path, "robustness")
    with made_by("robustness"):
        return parse_record(Robustness, content, str(path), exact=True)


def _lists(robustness: Robustness) -> Iterator[tuple[str, list[Any]]]:
    """Each list by its name in the file."""
    for name, values in robustness.reference.items():
        yield f"reference.{name}", values
    for variant in robustness.variants:
        for name in robustness.reference:
            for key, values in vars(variant.reducers[name]).items():
                yield f"{variant.name}.{name}.{key}", values


def tables(robustness: Robustness) -> list[Table]:
    """Overlap on the images of the questions and on photographs, and points of score, a row a variant."""
    overlap = f"Overlap (IoU, lowest in brackets) on the images of {robustness.questions} questions"
    photographs = f"Overlap (IoU, lowest in brackets) on {robustness.photographs} photographs"
    variants = robustness.variants
    header = _header(robustness)
    own = [
        [each.name, *(SAME if each.no_pixel_changed else _overlap(found) for found in _each(each, "iou"))]
        for each in variants
    ]
    larger = [[each.name, *map(_overlap, _each(each, "photographs"))] for each in variants]
    means = [robustness.full, *(mean for line in robustness.reference.values() for mean in line)]
    reference = ["reference, %", *(f"{100 * mean:.1f}" for mean in means)]
    changes = [[each.name, *map(_points, (each.full, *_each(each, "change")))] for each in variants]
    return [
        Table(overlap, header, [own]),
        Table(photographs, header, [larger]),
        Table("Points of score", [header[0], "all tokens", *header[1:]], [[reference], changes]),
    ]


def _header(robustness: Robustness) -> list[str]:
    cells = [f"{name} {keep:g}" for name in robustness.reference for keep in robustness.keep]
    return ["deployment", *cells]


def _each(variant: Variant, key: str) -> list[Any]:
    """What a variant changes, by reducer and then by kept fraction."""
    return [value for line in variant.reducers.values() for value in getattr(line, key)]


def _overlap(overlap: Overlap | None) -> str:
    return MISSING if overlap is None else f"{overlap.mean:.3f} ({overlap.lowest:.2f})"


def _points(change: Change) -> str:
    mean, low, high = (100 * value for value in (change.mean, change.low, change.high))
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def figure(robustness: Robustness, best: str) -> bytes:
    """Overlap and points of score of every reducer, a row a variant, two panels for each kept fraction.

    Where no pixel of the questions' images changed, hollow marks show the overlap on photographs.
    """
    names, variants, keeps = list(robustness.reference), robustness.variants, robustness.keep
    looks = styles(names, best)
    with theme():
        size = 2.4 + 4.2 * len(keeps), 1.4 + 0.26 * len(variants)
        drawing = Figure(figsize=size, layout="constrained")
        panels = drawing.subplots(1, 2 * len(keeps), sharey=True)
        for place, keep in enumerate(keeps):
            overlap, points = panels[2 * place : 2 * place + 2]
            overlap.set_title(f"IoU, {keep:g} kept", loc="left")
            points.set_title(f"points, {keep:g} kept", loc="left")
            _intervals(points, [variant.full for variant in variants], looks["full"], 0.0)
            for number, name in enumerate(names):
                aside = 0.6 * ((number + 1) / (len(names) + 1) - 0.5)
                lines = [variant.reducers[name] for variant in variants]
                _overlaps(overlap, lines, variants, place, looks[name], aside)
                _intervals(points, [line.change[place] for line in lines], looks[name], aside)
        panels[0].set_yticks(range(len(variants)), [variant.name for variant in variants])
        panels[0].invert_yaxis()
        for axes in panels:
            axes.grid(axis="both", color=RULE, linewidth=0.4)
            axes.set_axisbelow(True)
        handles, labels = panels[1].get_legend_handles_labels()
        drawing.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 6))
        return png(drawing)


def _overlaps(
    axes: Axes, lines: Sequence[Line], variants: Sequence[Variant], place: int, look: Style, aside: float
) -> None:
    for row, (line, variant) in enumerate(zip(lines, variants, strict=True)):
        hollow = variant.no_pixel_changed
        overlap = (line.photographs if hollow else line.iou)[place]
        if overlap:
            face = "none" if hollow else look.color
            axes.plot(
                overlap.mean, row + aside, look.marker or "|", color=look.color, mfc=face, markersize=4.5
            )


def _intervals(axes: Axes, changes: Sequence[Change], look: Style, aside: float) -> None:
    means = [100 * change.mean for change in changes]
    spans = [[100 * (change.mean - change.low), 100 * (change.high - change.mean)] for change in changes]
    axes.errorbar(
        means,
        [row + aside for row in range(len(changes))],
        xerr=list(zip(*spans, strict=True)),
        fmt=look.marker or "|",
        color=look.color,
        markersize=4.5,
        elinewidth=0.9,
        label=look.label,
    )
