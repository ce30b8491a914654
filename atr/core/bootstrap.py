"""Bootstrap over questions: resampling units and percentile intervals."""

import zlib
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atr.core.records import Row

Floats = NDArray[np.float64]
INTERVAL = (2.5, 97.5)
"""Percentiles of the resampled means that bound a 95 % interval."""


def by_unit(rows: Iterable[Row]) -> dict[str, list[list[Row]]]:
    """The rows of each resampling unit, as a list by seed of lists by question, in order of first appearance.

    A unit is a set of questions that count only together, or a single question.
    """
    rows = list(rows)
    seeds = list(dict.fromkeys(row.seed for row in rows))
    unit_of = {row.id: row.unit or row.id for row in rows}
    table = {(row.seed, row.id): row for row in rows}
    assert len(table) == len(rows) == len(seeds) * len(unit_of), "every question once under every seed"
    members: dict[str, list[str]] = {}
    for question, unit in unit_of.items():
        members.setdefault(unit, []).append(question)
    return {
        unit: [[table[seed, question] for question in questions] for seed in seeds]
        for unit, questions in members.items()
    }


@lru_cache(maxsize=1)
def draw(benchmark: str, units: int, resamples: int, seed: int) -> NDArray[np.int64]:
    """Indices of the units in each resample, read-only (resamples, units); equal arguments give equal draws.

    Means over equally many units of a benchmark are thus resampled in pairs, across calls and processes.
    """
    generator = np.random.default_rng([seed, zlib.crc32(benchmark.encode())])
    chosen_RU = generator.integers(units, size=(resamples, units))
    chosen_RU.setflags(write=False)
    return chosen_RU


def resampled(score_U: Floats, benchmark: str, resamples: int, seed: int) -> Floats:
    """Mean score over the units of each resample, float64 (resamples,)."""
    mean_R: Floats = score_U[draw(benchmark, len(score_U), resamples, seed)].mean(axis=1)
    return mean_R


def interval(mean_R: NDArray[Any]) -> tuple[float, float]:
    """Lower and upper bound of the 95 % percentile interval of resampled means."""
    low, high = np.percentile(mean_R, INTERVAL)
    return float(low), float(high)
