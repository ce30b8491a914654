"""Differences between two reducers on the same questions: paired intervals, wins, ties and losses."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from atr.core.bootstrap import Floats, interval, resampled
from atr.reporting.results import Comparison, Evaluation, Results, ScorePoint, fixed_counterpart

WIN, TIE, LOSS = OUTCOMES = ("win", "tie", "loss")
ROUNDING = 1e-9
"""An interval bound this close to zero counts as zero: scores are coarser, so the rest is rounding."""

UNANSWERED = float("-inf")
"""Stands for the score of a question without one: below all others, so that it is the lowest of its unit."""

UnitScores = Mapping[str, float]
"""Score of each answered unit of one benchmark at one kept fraction, a mean over seeds."""
ScoresByCell = dict[tuple[str, float | None], UnitScores]
"""Scores of one reducer by benchmark and kept fraction."""


@dataclass(frozen=True)
class Difference:
    """Mean score of one reducer minus that of another, in -1..1, with its paired 95 % interval."""

    mean: float
    low: float
    high: float

    @property
    def outcome(self) -> str:
        """WIN if the whole interval is above zero, LOSS if it is below, else TIE."""
        if self.low > ROUNDING:
            return WIN
        return LOSS if self.high < -ROUNDING else TIE


@dataclass(frozen=True)
class PairedDifferences:
    """The best reducer minus each other one on a benchmark or group, by name and kept fraction."""

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
class AdaptiveMatch:
    """An adaptive count against fixed counts of the same reducer at the same mean number of tokens.

    `fixed` is the score of that reducer, interpolated linearly in the tokens between the two nearest kept
    fractions. It and the difference are None if that reducer was not evaluated, or never kept so few tokens.
    """

    comparison: Comparison
    adaptive: str
    score: ScorePoint
    fixed: float | None
    difference: Difference | None


@dataclass(frozen=True)
class _Sample:
    """Mean difference on one benchmark, and in each of R resamples."""

    mean: float
    mean_R: Floats


def paired_differences(results: Results, best: str) -> list[PairedDifferences]:
    """The reducer `best` minus every other that takes a kept fraction, by group and then by benchmark.

    Scores are means over seeds; only units that both reducers answered count. The interval is a bootstrap
    over units within each benchmark; that of a group is of the mean over its benchmarks.
    Raises ValueError if `best` has no results.
    """
    if best not in results.budgeted:
        raise ValueError(f"report.best: {best!r} is not evaluated, allowed: {', '.join(results.budgeted)}")
    reference = results.evaluations[best]
    others = {name: _scores_by_cell(results.evaluations[name]) for name in results.budgeted if name != best}
    samples = {
        (benchmark, other, keep): _sample(benchmark, scores, cells[benchmark, keep], reference)
        for (benchmark, keep), scores in _scores_by_cell(reference).items()
        for other, cells in others.items()
        if (benchmark, keep) in cells
    }
    return [
        PairedDifferences(comparison, best, {other: _line(samples, comparison, other) for other in others})
        for comparison in (*results.groups, *results.benchmarks)
    ]


def match_adaptive(results: Results) -> list[AdaptiveMatch]:
    """Each adaptive reducer against its counterpart with fixed counts, on every group and benchmark."""
    full = _scores_by_cell(results.evaluations["full"])
    matches = []
    for name in results.adaptive:
        adaptive, counterpart = results.evaluations[name], fixed_counterpart(name)
        scores, fixed = _scores_by_cell(adaptive), full
        if counterpart in results.budgeted:
            fixed = _scores_by_cell(results.evaluations[counterpart]) | full
        for comparison in (*results.groups, *results.benchmarks):
            matches.append(_match(comparison, adaptive, scores, counterpart, fixed))
    return matches


def _match(
    comparison: Comparison, adaptive: Evaluation, scores: ScoresByCell, counterpart: str, fixed: ScoresByCell
) -> AdaptiveMatch:
    score = comparison.adaptive[adaptive.reducer]
    # Keeping every token is `full` for every reducer, so each curve ends there.
    curve = [point for point in comparison.curves.get(counterpart, ()) if point.keep < 1]
    neighbours = _neighbours([*curve, comparison.full], score.tokens)
    if neighbours is None:
        return AdaptiveMatch(comparison, adaptive.reducer, score, None, None)
    below, above, weight = neighbours
    samples = []
    for name in comparison.benchmarks:
        mixed = _interpolated(fixed[name, below.keep], fixed[name, above.keep], weight)
        samples.append(_sample(name, scores[name, None], mixed, adaptive))
    level = (1 - weight) * below.mean + weight * above.mean
    return AdaptiveMatch(comparison, adaptive.reducer, score, level, _difference(samples))


def _neighbours(curve: Iterable[ScorePoint], tokens: float) -> tuple[ScorePoint, ScorePoint, float] | None:
    """The points of a curve around a number of tokens, and the weight of the upper one."""
    for below, above in pairwise(curve):
        if below.tokens <= tokens <= above.tokens:
            span = above.tokens - below.tokens
            return below, above, (tokens - below.tokens) / span if span else 0.0
    return None


def _interpolated(below: UnitScores, above: UnitScores, weight: float) -> UnitScores:
    return {unit: (1 - weight) * below[unit] + weight * above[unit] for unit in below if unit in above}


def _scores_by_cell(evaluation: Evaluation) -> ScoresByCell:
    """Score of each unit whose questions are all answered: the lowest of them, a mean over seeds."""
    cells: dict[tuple[str, float | None], dict[str, dict[int | None, float]]] = {}
    for row in evaluation.rows:
        lowest = cells.setdefault((row.benchmark, row.keep), {}).setdefault(row.unit or row.id, {})
        score = UNANSWERED if row.score is None else row.score
        lowest[row.seed] = min(score, lowest.get(row.seed, score))
    return {cell: dict(_unit_scores(units)) for cell, units in cells.items()}


def _unit_scores(units: Mapping[str, Mapping[int | None, float]]) -> Iterable[tuple[str, float]]:
    for unit, lowest in units.items():
        if UNANSWERED not in lowest.values():
            yield unit, sum(lowest.values()) / len(lowest)


def _sample(benchmark: str, ours: UnitScores, theirs: UnitScores, reference: Evaluation) -> _Sample | None:
    """Resampled differences over the units that both answered; None if there are none."""
    difference_U = np.array([score - theirs[unit] for unit, score in ours.items() if unit in theirs])
    if not len(difference_U):
        return None
    mean_R = resampled(difference_U, benchmark, reference.resamples, reference.seed)
    return _Sample(float(difference_U.mean()), mean_R)


def _line(
    samples: Mapping[tuple[str, str, float | None], _Sample | None], comparison: Comparison, other: str
) -> dict[float, Difference]:
    """The differences to one reducer at every kept fraction at which all benchmarks have one."""
    line = {}
    for score in comparison.curves[other]:
        parts = [samples.get((name, other, score.keep)) for name in comparison.benchmarks]
        if difference := _difference(parts):
            line[score.keep] = difference
    return line


def _difference(samples: list[_Sample | None]) -> Difference | None:
    """Mean over benchmarks with its interval; None if a benchmark has no question in common."""
    present = [sample for sample in samples if sample]
    if not present or len(present) < len(samples):
        return None
    low, high = interval(np.mean([sample.mean_R for sample in present], axis=0))
    return Difference(float(np.mean([sample.mean for sample in present])), low, high)
