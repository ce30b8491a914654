"""From one row per answer to the points of the curves: means with intervals over the questions."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from atr.core.bootstrap import Floats, by_unit, interval, resampled
from atr.core.records import ANSWERED, STATUSES, Row

TOKENS = ("tokens", "tokens_fed", "tokens_full")
"""Visual tokens of a row, and of an entry their mean."""


@dataclass(frozen=True)
class _Point:
    """One benchmark at one kept fraction: U answered units under S seeds, R resampled means, all its rows."""

    rows: list[Row]
    score_SU: Floats
    anls_SU: Floats
    mean_R: Floats
    tokens: dict[str, float]
    """Means over the answered units, by their key in an entry."""
    counts: dict[str, int]
    """Units by status; the ones that are answered under every seed have it so."""


def summarise(rows: Sequence[Row], resamples: int, seed: int) -> list[dict[str, Any]]:
    """One entry for each benchmark and each group at each kept fraction, in the order of the rows.

    Of an adaptive count `keep` is None, and `tokens` of `tokens_full` say what it kept on average.
    A question's score is its mean over seeds, that of a unit of several questions the lowest of theirs, a
    group's the mean of its benchmarks. `tokens`, `tokens_fed` (with newlines) and `tokens_full` (in all) are
    means of the same questions, weighed as their scores are. `questions` counts units, and of these
    `answered`, `unreadable` and `failed`; only the answered ones are in the means. `low` and `high` bound the
    mean's 95 % interval by a bootstrap over the answered units within each benchmark; it draws the same ones
    at every kept fraction and for every reducer that answered as many, so differences between curves are
    paired. `seed_means` has the mean of each seed.
    Raises ValueError for a benchmark of which nothing is answered.
    """
    cells: dict[tuple[str, float | None], list[Row]] = {}
    for row in rows:
        cells.setdefault((row.benchmark, row.keep), []).append(row)
    points = {cell: _point(cell_rows, resamples, seed) for cell, cell_rows in cells.items()}
    entries = [_entry("benchmark", benchmark, keep, [point]) for (benchmark, keep), point in points.items()]
    groups: dict[tuple[str, float | None], list[_Point]] = {}
    for (_, keep), point in points.items():
        groups.setdefault((point.rows[0].group, keep), []).append(point)
    return entries + [_entry("group", group, keep, members) for (group, keep), members in groups.items()]


def curves(entries: Iterable[Mapping[str, Any]]) -> Iterator[tuple[float, str, float]]:
    """The points of `summarise`: kept fraction, name of benchmark or group, and mean score.

    Of an adaptive count the fraction is the mean one, 1 where there are no visual tokens to lose.
    """
    for entry in entries:
        adaptive = entry["tokens"] / entry["tokens_full"] if entry["tokens_full"] else 1.0
        keep = adaptive if entry["keep"] is None else entry["keep"]
        yield keep, entry.get("group") or entry["benchmark"], entry["mean"]


def tokens_full(rows: Iterable[Row]) -> float:
    """Mean number of visual tokens of a question with all of them, over those answered under any trial.

    It is the same for all reducers that answered the same questions, whatever they keep.
    """
    return float(np.mean(list({row.id: row.tokens_full for row in rows if row.status == ANSWERED}.values())))


def _point(rows: list[Row], resamples: int, seed: int) -> _Point:
    units = list(by_unit(rows).values())
    statuses = [_status(row for line in lines for row in line) for lines in units]
    answered = [lines for lines, status in zip(units, statuses, strict=True) if status == ANSWERED]
    if not answered:
        reason = next(row.error for row in rows if row.error)
        raise ValueError(
            f"{rows[0].benchmark}: nothing is answered at kept fraction {rows[0].keep}: {reason}"
        )
    score_SU, anls_SU = _lowest(answered, "score"), _lowest(answered, "anls")
    mean_R = resampled(score_SU.mean(axis=0), rows[0].benchmark, resamples, seed)
    tokens = {key: _mean(answered, key) for key in TOKENS}
    counts = {status: statuses.count(status) for status in STATUSES}
    return _Point(rows, score_SU, anls_SU, mean_R, tokens, counts)


def _status(rows: Iterable[Row]) -> str:
    """Answered if all rows are, else the first other status among them."""
    return next((row.status for row in rows if row.status != ANSWERED), ANSWERED)


def _lowest(units: list[list[list[Row]]], key: str) -> Floats:
    """The lowest score (or anls) of each answered unit under each seed, float64 (S, U)."""
    lowest_US = [[min(getattr(row, key) for row in line) for line in lines] for lines in units]
    return np.array(lowest_US, dtype=np.float64).T.copy()


def _mean(units: list[list[list[Row]]], key: str) -> float:
    """Mean over units of the mean over a unit's rows."""
    return float(np.mean([np.mean([getattr(row, key) for line in lines for row in line]) for lines in units]))


def _entry(kind: str, name: str, keep: float | None, points: list[_Point]) -> dict[str, Any]:
    low, high = interval(np.mean([point.mean_R for point in points], axis=0))
    seed_means_S = np.mean([point.score_SU.mean(axis=1) for point in points], axis=0)
    return {
        kind: name,
        "keep": keep,
        **{key: float(np.mean([point.tokens[key] for point in points])) for key in TOKENS},
        "mean": float(np.mean([point.score_SU.mean() for point in points])),
        "low": low,
        "high": high,
        "anls": float(np.mean([point.anls_SU.mean() for point in points])),
        "seed_means": seed_means_S.tolist(),
        "questions": sum(sum(point.counts.values()) for point in points),
        **{status: sum(point.counts[status] for point in points) for status in STATUSES},
        "seeds": len(seed_means_S),
    }
