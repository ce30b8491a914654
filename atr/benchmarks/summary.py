"""From one row per answer to the points of the curves: means with intervals over the questions."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atr.benchmarks.loop import Row

Floats = NDArray[np.float64]
INTERVAL = (2.5, 97.5)
"""Percentiles of the resampled means: a 95 % interval."""


@dataclass(frozen=True)
class _Point:
    """One benchmark at one kept fraction: Q questions under S seeds, and R resampled means."""

    rows: list[Row]
    score_SQ: Floats
    anls_SQ: Floats
    mean_R: Floats


def summarise(rows: Sequence[Row], resamples: int, seed: int) -> list[dict[str, Any]]:
    """One entry for each benchmark and each group at each kept fraction, in the order of the rows.

    A question's score is its mean over seeds, a group's the mean of its benchmarks. `low` and `high` bound
    the mean's 95 % interval by a bootstrap over the questions within each benchmark; it draws the same
    questions at every kept fraction and for every reducer, so differences between curves are paired.
    `seed_means` has the mean of each seed.
    """
    cells: dict[tuple[str, float], list[Row]] = {}
    for row in rows:
        cells.setdefault((row.benchmark, row.keep), []).append(row)
    points = {cell: _point(cell_rows, resamples, seed) for cell, cell_rows in cells.items()}
    entries = [_entry("benchmark", benchmark, keep, [point]) for (benchmark, keep), point in points.items()]
    groups: dict[tuple[str, float], list[_Point]] = {}
    for (_, keep), point in points.items():
        groups.setdefault((point.rows[0].group, keep), []).append(point)
    return entries + [_entry("group", group, keep, members) for (group, keep), members in groups.items()]


def _point(rows: list[Row], resamples: int, seed: int) -> _Point:
    questions = list(dict.fromkeys(row.id for row in rows))
    seeds = list(dict.fromkeys(row.seed for row in rows))
    table = {(row.seed, row.id): row for row in rows}
    assert len(table) == len(rows) == len(seeds) * len(questions), "every question once under every seed"
    ordered = [[table[drawn, question] for question in questions] for drawn in seeds]
    score_SQ = np.array([[row.score for row in line] for line in ordered], dtype=np.float64)
    anls_SQ = np.array([[row.anls for row in line] for line in ordered], dtype=np.float64)
    draw = np.random.default_rng([seed, zlib.crc32(rows[0].benchmark.encode())])
    chosen_RQ = draw.integers(len(questions), size=(resamples, len(questions)))
    return _Point(rows, score_SQ, anls_SQ, score_SQ.mean(axis=0)[chosen_RQ].mean(axis=1))


def _entry(kind: str, name: str, keep: float, points: list[_Point]) -> dict[str, Any]:
    low, high = np.percentile(np.mean([point.mean_R for point in points], axis=0), INTERVAL)
    seed_means_S = np.mean([point.score_SQ.mean(axis=1) for point in points], axis=0)
    return {
        kind: name,
        "keep": keep,
        "tokens": float(np.mean([row.tokens for point in points for row in point.rows])),
        "mean": float(np.mean([point.score_SQ.mean() for point in points])),
        "low": float(low),
        "high": float(high),
        "anls": float(np.mean([point.anls_SQ.mean() for point in points])),
        "seed_means": seed_means_S.tolist(),
        "questions": sum(point.score_SQ.shape[1] for point in points),
        "seeds": len(seed_means_S),
    }
