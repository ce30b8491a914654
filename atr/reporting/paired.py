"""One reducer minus another on the same questions: paired intervals, and who wins by them."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from atr.core.bootstrap import Floats, by_unit, interval, resampled
from atr.reporting.results import ADAPTIVE, Comparison, Evaluation, Results, Row, Score

WIN, TIE, LOSS = OUTCOMES = ("win", "tie", "loss")
ROUNDING = 1e-9
"""A bound of an interval this near to zero is zero: its sum was rounded, and no score is so fine."""

Scores = Mapping[str, float]
"""The score of each answered unit of one benchmark at one kept fraction, its mean over seeds."""
Asked = dict[tuple[str, float | None], Scores]
"""Scores of one reducer by benchmark and kept fraction."""


@dataclass(frozen=True)
class Difference:
    """Mean of one reducer's score minus another's, in -1..1, with its paired 95 % interval."""

    mean: float
    low: float
    high: float

    @property
    def outcome(self) -> str:
        """A win where the whole interval is above zero, a loss where it is below, else a tie."""
        if self.low > ROUNDING:
            return WIN
        return LOSS if self.high < -ROUNDING else TIE


@dataclass(frozen=True)
class Versus:
    """The best reducer minus each other one on a benchmark or a group, by its name and kept fraction."""

    comparison: Comparison
    best: str
    others: dict[str, dict[float, Difference]]

    @property
    def keeps(self) -> list[float]:
        """Kept fractions at which there is a difference, rising."""
        return sorted({keep for line in self.others.values() for keep in line})

    def outcomes(self, keep: float) -> Counter[str]:
        """How often the best reducer wins, ties and loses at a kept fraction."""
        return Counter(line[keep].outcome for line in self.others.values() if keep in line)


@dataclass(frozen=True)
class Match:
    """An adaptive count beside fixed ones of the same reducer at the same mean number of tokens.

    `fixed` is that reducer's score, linear in the tokens between the two nearest budgets; it and the
    difference are None where it was not evaluated, or never kept so few.
    """

    comparison: Comparison
    adaptive: str
    score: Score
    fixed: float | None
    difference: Difference | None


@dataclass(frozen=True)
class _Sample:
    """Mean difference on one benchmark, and in each of R resamples."""

    mean: float
    mean_R: Floats


def versus(results: Results, best: str) -> list[Versus]:
    """The reducer `best` minus every other that takes a budget, for each group and then each benchmark.

    A unit's difference is that of its scores, each a mean over seeds; only units that both answered count.
    The interval is a bootstrap over them within each benchmark; a group's is that of its benchmarks' mean.
    Raises ValueError for a reducer that was not evaluated; the parameters hold it to be.
    """
    if best not in results.budgeted:
        raise ValueError(f"report.best: {best!r} is not evaluated, allowed: {', '.join(results.budgeted)}")
    reference = results.evaluations[best]
    others = [name for name in results.budgeted if name != best]
    asked = {name: _asked(results.evaluations[name]) for name in others}
    samples = {
        (benchmark, other, keep): _sample(benchmark, scores, asked[other][benchmark, keep], reference)
        for (benchmark, keep), scores in _asked(reference).items()
        for other in others
        if (benchmark, keep) in asked[other]
    }
    return [
        Versus(comparison, best, {other: _line(samples, comparison, other) for other in others})
        for comparison in (*results.groups, *results.benchmarks)
    ]


def matches(results: Results) -> list[Match]:
    """Each adaptive reducer against its sibling, the reducer of that name without the ending."""
    comparisons = (*results.groups, *results.benchmarks)
    full = _asked(results.evaluations["full"])
    found = []
    for name in results.adaptive:
        sibling = name.removesuffix(ADAPTIVE)
        fixed = _asked(results.evaluations[sibling]) if sibling in results.budgeted else {}
        asked = _asked(results.evaluations[name])
        for comparison in comparisons:
            found.append(_match(comparison, results.evaluations[name], asked, sibling, fixed | full))
    return found


def _match(comparison: Comparison, adaptive: Evaluation, asked: Asked, sibling: str, fixed: Asked) -> Match:
    score = comparison.adaptive[adaptive.reducer]
    # Keeping every token is `full` for every reducer, so each curve ends there.
    budgets = [point for point in comparison.curves.get(sibling, ()) if point.keep < 1]
    between = _between([*budgets, comparison.full], score.tokens)
    if between is None:
        return Match(comparison, adaptive.reducer, score, None, None)
    below, above, weight = between
    mixed = {
        name: _mixed(fixed[name, below.keep], fixed[name, above.keep], weight)
        for name in comparison.benchmarks
    }
    samples = [_sample(name, asked[name, None], mixed[name], adaptive) for name in comparison.benchmarks]
    level = (1 - weight) * below.mean + weight * above.mean
    return Match(comparison, adaptive.reducer, score, level, _difference(samples))


def _between(curve: Iterable[Score], tokens: float) -> tuple[Score, Score, float] | None:
    """The neighbours of a number of tokens on a curve, and the weight of the upper one."""
    for below, above in pairwise(curve):
        if below.tokens <= tokens <= above.tokens:
            span = above.tokens - below.tokens
            return below, above, (tokens - below.tokens) / span if span else 0.0
    return None


def _mixed(below: Scores, above: Scores, weight: float) -> Scores:
    return {unit: (1 - weight) * below[unit] + weight * above[unit] for unit in below if unit in above}


def _asked(evaluation: Evaluation) -> Asked:
    cells: dict[tuple[str, float | None], list[Row]] = {}
    for row in evaluation.rows:
        cells.setdefault((row.benchmark, row.keep), []).append(row)
    return {cell: dict(_scores(rows)) for cell, rows in cells.items()}


def _scores(rows: list[Row]) -> Iterable[tuple[str, float]]:
    """The lowest score of each unit's questions, its mean over seeds, if all of them are answered."""
    for unit, lines in by_unit(rows).items():
        scores = [[row.score for row in line if row.score is not None] for line in lines]
        if sum(map(len, scores)) == sum(map(len, lines)):
            yield unit, float(np.mean([min(line) for line in scores]))


def _sample(benchmark: str, ours: Scores, theirs: Scores, reference: Evaluation) -> _Sample | None:
    """Resample the differences of the units that both answered; None where there are none."""
    difference_U = np.array([score - theirs[unit] for unit, score in ours.items() if unit in theirs])
    if not len(difference_U):
        return None
    mean_R = resampled(difference_U, benchmark, reference.resamples, reference.seed)
    return _Sample(float(difference_U.mean()), mean_R)


def _line(
    samples: Mapping[tuple[str, str, float | None], _Sample | None], comparison: Comparison, other: str
) -> dict[float, Difference]:
    """The differences to one reducer at every kept fraction where all benchmarks have one."""
    line = {}
    for score in comparison.curves[other]:
        parts = [samples.get((name, other, score.keep)) for name in comparison.benchmarks]
        if difference := _difference(parts):
            line[score.keep] = difference
    return line


def _difference(samples: list[_Sample | None]) -> Difference | None:
    """Mean over benchmarks and its interval; None where one of them has no question in common."""
    present = [sample for sample in samples if sample]
    if not present or len(present) < len(samples):
        return None
    low, high = interval(np.mean([sample.mean_R for sample in present], axis=0))
    return Difference(float(np.mean([sample.mean for sample in present])), low, high)
