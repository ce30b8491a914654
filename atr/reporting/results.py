"""The results of all reducers, and their comparison on benchmarks and groups of benchmarks."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from atr.core.records import Row
from atr.reporting.cells import Provenance

LEADING = ("selector", "random")
"""The reducers that the paper compares, in the order of the report's tables."""


@dataclass(frozen=True)
class ScorePoint:
    """Mean score at one kept fraction, in 0..1, with its 95 % interval and the mean tokens of a question.

    A reducer that chooses its own count has one point, at the mean fraction it keeps.
    """

    keep: float
    tokens: float
    """Visual tokens kept."""
    tokens_fed: float
    """Visual tokens kept, plus the newlines fed to the language model with them."""
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Masks:
    """Kept tokens of a few images, as indices in raster order into a grid of rows x columns.

    `grid` is that of all images, None if each has its own in `grids`.
    """

    grid: tuple[int, int] | None
    keep: float | None
    """None if the reducer chooses a count for each image."""
    kept: dict[str, list[int]]
    grids: dict[str, tuple[int, int]] = field(default_factory=dict)

    def grid_of(self, image: str) -> tuple[int, int]:
        """Rows and columns of an image's tokens."""
        return self.grid or self.grids[image]


@dataclass(frozen=True)
class Evaluation:
    """The results of one reducer; curves by kind (benchmark or group) and name."""

    reducer: str
    budget: str
    """How its number of tokens is chosen; see `atr.core.catalog.ReducerTraits`."""
    encoder: str
    vlm: str
    tokens_full: float
    curves: dict[tuple[str, str], tuple[ScorePoint, ...]]
    rows: list[Row]
    masks: Masks | None
    resamples: int
    """Bootstrap resamples of the questions, for intervals."""
    seed: int
    """Seed of the bootstrap."""
    parameters: dict[str, Any]
    provenance: Provenance
    resolved: dict[str, Any]
    """How the answers were computed: precision, device, attention kernel, versions of model and features;
    `features` is None if the images themselves were encoded."""


@dataclass(frozen=True)
class Pretraining:
    """The results of stage pretrain: experiments/pretrain/metrics.json."""

    final: dict[str, float]
    """Metrics at the end of the last epoch."""
    parameters: dict[str, Any]
    provenance: Provenance
    resolved: dict[str, Any]


@dataclass(frozen=True)
class Comparison:
    """All reducers on one benchmark or one group: the content of one plot and one table."""

    kind: str
    name: str
    full: ScorePoint
    none: ScorePoint | None
    """None if the reducer `none` was not evaluated."""
    curves: dict[str, tuple[ScorePoint, ...]]
    adaptive: dict[str, ScorePoint] = field(default_factory=dict)
    benchmarks: tuple[str, ...] = ()
    """The benchmarks over which the scores are means."""

    @property
    def title(self) -> str:
        """The name in headings."""
        return f"{self.name} group" if self.kind == "group" else self.name

    @property
    def keeps(self) -> list[float]:
        """Kept fractions at which any reducer was evaluated, rising."""
        return sorted({score.keep for curve in self.curves.values() for score in curve})

    def at(self, reducer: str, keep: float) -> ScorePoint | None:
        """The score of a reducer at a kept fraction, None if it was not evaluated there."""
        return next((score for score in self.curves.get(reducer, ()) if score.keep == keep), None)

    def mean(self, reducer: str, keep: float) -> float | None:
        """The mean of that score."""
        score = self.at(reducer, keep)
        return score.mean if score else None


@dataclass(frozen=True)
class Results:
    """The evaluations of all reducers, and the metrics of the pretraining."""

    evaluations: dict[str, Evaluation]
    pretraining: Pretraining

    @property
    def budgeted(self) -> list[str]:
        """The reducers that take a kept fraction: the selector and random first, then the others by name."""
        budgeted = sorted(name for name, one in self.evaluations.items() if one.budget == "asked")
        return [*self.leading, *(name for name in budgeted if name not in self.leading)]

    @property
    def leading(self) -> list[str]:
        """The selector, and random if it was evaluated."""
        return [name for name in LEADING if name in self.evaluations]

    @property
    def adaptive(self) -> list[str]:
        """The reducers that choose their own number of tokens for each image, by name."""
        return sorted(name for name, one in self.evaluations.items() if one.budget == "own")

    @cached_property
    def groups(self) -> list[Comparison]:
        """One comparison for each group of benchmarks, in the order of the evaluation."""
        return self._comparisons("group")

    @cached_property
    def benchmarks(self) -> list[Comparison]:
        """One comparison for each benchmark, in the order of the evaluation."""
        return self._comparisons("benchmark")

    @cached_property
    def shared(self) -> list[float]:
        """Kept fractions at which all of `leading` were evaluated on every benchmark, rising."""
        every = [*self.groups, *self.benchmarks]
        curves = [comparison.curves[name] for comparison in every for name in self.leading]
        return sorted(set.intersection(*({score.keep for score in curve} for curve in curves)))

    @property
    def half(self) -> float:
        """The shared kept fraction nearest to one half, the lower of two."""
        return self.nearest(0.5)

    def nearest(self, keep: float) -> float:
        """The shared kept fraction nearest to `keep`, the lower of two."""
        return min(self.shared, key=lambda shared: abs(shared - keep))

    @property
    def unanswered(self) -> set[str]:
        """Questions without an answer for some reducer, kept fraction or seed."""
        return {row.id for one in self.evaluations.values() for row in one.rows if row.score is None}

    def answers(self, reducer: str, keep: float) -> dict[str, Row]:
        """Answered rows of a reducer at a kept fraction, by question; of several seeds, the lowest."""
        answered = (row for row in self.evaluations[reducer].rows if row.score is not None)
        rows = [row for row in answered if row.keep == keep]
        lowest = min((row.seed or 0 for row in rows), default=0)
        return {row.id: row for row in rows if (row.seed or 0) == lowest}

    def _comparisons(self, kind: str) -> list[Comparison]:
        names = [name for of_kind, name in self.evaluations["full"].curves if of_kind == kind]
        return [self._comparison(kind, name) for name in names]

    def _comparison(self, kind: str, name: str) -> Comparison:
        every = self.evaluations
        group_of = {row.benchmark: row.group for row in every["full"].rows}
        members = [benchmark for benchmark, group in group_of.items() if group == name]
        return Comparison(
            kind=kind,
            name=name,
            full=every["full"].curves[kind, name][0],
            none=every["none"].curves[kind, name][0] if "none" in every else None,
            curves={reducer: every[reducer].curves[kind, name] for reducer in self.budgeted},
            adaptive={reducer: every[reducer].curves[kind, name][0] for reducer in self.adaptive},
            benchmarks=tuple(members) if kind == "group" else (name,),
        )


def fixed_counterpart(adaptive: str) -> str:
    """The name of the same reducer with a fixed count: without the ending `_adaptive`."""
    return adaptive.removesuffix("_adaptive")
