"""Mean scores by benchmark, group and kept fraction, with intervals from a bootstrap over questions."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from atr.core.bootstrap import Floats, by_unit, interval, resampled
from atr.core.records import ANSWERED, STATUSES, Row

TOKENS = ("tokens", "tokens_fed", "tokens_full")
"""Keys of the visual tokens, counted in a row and averaged in an entry of the summary."""


@dataclass(frozen=True)
class _Point:
    """One benchmark at one kept fraction: scores of U answered units under S seeds, and R resampled means."""

    rows: list[Row]
    score_SU: Floats
    anls_SU: Floats
    mean_R: Floats
    tokens: dict[str, float]
    """Means over the answered units, by key of TOKENS."""
    counts: dict[str, int]
    """Number of units by status; `answered` are those that are answered under every seed."""


def summarise(rows: Sequence[Row], resamples: int, seed: int) -> list[dict[str, Any]]:
    """One entry per benchmark and per group at each kept fraction, in the order of the rows.

    A question's score is its mean over seeds; a unit of several questions scores the lowest of them; the
    score of a group is the mean over its benchmarks. `keep` is None for an adaptive count, whose mean kept
    fraction is `tokens` / `tokens_full`. `tokens`, `tokens_fed` (with newlines) and `tokens_full` (without
    reduction) are means over the same units with the same weights.
    `questions` counts units, of which some are `answered`, `unreadable` or `failed`; only answered ones enter
    the means. `low` and `high` bound the 95 % interval of the mean by a bootstrap over the answered units of
    each benchmark. It draws the same units at every kept fraction and for every reducer that answered equally
    many, so that differences between curves are paired. `seed_means` holds the mean of each seed.
    Raises ValueError for a benchmark without any answer.
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


def score_curves(entries: Iterable[Mapping[str, Any]]) -> Iterator[tuple[float, str, float]]:
    """Kept fraction, benchmark or group, and mean score of each entry of `summarise`.

    The fraction of an adaptive count is its mean, or 1 if there are no visual tokens to drop.
    """
    for entry in entries:
        adaptive = entry["tokens"] / entry["tokens_full"] if entry["tokens_full"] else 1.0
        keep = adaptive if entry["keep"] is None else entry["keep"]
        yield keep, entry.get("group") or entry["benchmark"], entry["mean"]


def mean_tokens_full(rows: Iterable[Row]) -> float:
    """Mean number of visual tokens without reduction, over the questions answered under any trial.

    It is equal for all reducers that answered the same questions.
    """
    return float(np.mean(list({row.id: row.tokens_full for row in rows if row.status == ANSWERED}.values())))


def _point(rows: list[Row], resamples: int, seed: int) -> _Point:
    units = list(by_unit(rows).values())
    statuses = [_status(row for line in lines for row in line) for lines in units]
    answered = [lines for lines, status in zip(units, statuses, strict=True) if status == ANSWERED]
    if not answered:
        reason = next(row.error for row in rows if row.error)
        raise ValueError(
            f"{rows[0].benchmark}: no question is answered at kept fraction {rows[0].keep}: {reason}"
        )
    score_SU, anls_SU = _lowest(answered, "score"), _lowest(answered, "anls")
    mean_R = resampled(score_SU.mean(axis=0), rows[0].benchmark, resamples, seed)
    tokens = {key: _mean(answered, key) for key in TOKENS}
    counts = {status: statuses.count(status) for status in STATUSES}
    return _Point(rows, score_SU, anls_SU, mean_R, tokens, counts)


def _status(rows: Iterable[Row]) -> str:
    """`answered` if all rows are, else the first other status."""
    return next((row.status for row in rows if row.status != ANSWERED), ANSWERED)


def _lowest(units: list[list[list[Row]]], key: str) -> Floats:
    """Lowest score (or ANLS) within each unit under each seed, float64 (S, U)."""
    lowest_US = [[min(getattr(row, key) for row in line) for line in lines] for lines in units]
    return np.array(lowest_US, dtype=np.float64).T.copy()


def _mean(units: list[list[list[Row]]], key: str) -> float:
    """Mean over units of the mean over a unit's rows."""
    counts_UR = ([getattr(row, key) for line in lines for row in line] for lines in units)
    return float(np.mean([sum(counts_R) / len(counts_R) for counts_R in counts_UR]))


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
