"""What a mean over questions is a mean of, and which of them its bootstrap draws."""

import zlib
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
INTERVAL = (2.5, 97.5)
"""Percentiles of the resampled means: a 95 % interval."""


class Line(Protocol):
    """What is read of an answer to one question under one seed."""

    @property
    def id(self) -> str:
        """Name of the question."""

    @property
    def unit(self) -> str:
        """Name shared by the questions that count only together; empty if it counts alone."""

    @property
    def seed(self) -> int | None:
        """Of the reducer; None if it draws nothing."""


L = TypeVar("L", bound=Line)


def by_unit(rows: Iterable[L]) -> dict[str, list[list[L]]]:
    """For each unit its rows by seed and then question, all of them in the order of their first row."""
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
    """Indices of the units in each resample, read-only (resamples, units), the same for equal arguments.

    So two means of as many units of a benchmark are resampled in pairs, whoever asks and whenever.
    """
    generator = np.random.default_rng([seed, zlib.crc32(benchmark.encode())])
    chosen_RU = generator.integers(units, size=(resamples, units))
    chosen_RU.setflags(write=False)
    return chosen_RU


def resampled(score_U: Floats, benchmark: str, resamples: int, seed: int) -> Floats:
    """Mean of the units' scores in each resample, float64 (resamples,)."""
    mean_R: Floats = score_U[draw(benchmark, len(score_U), resamples, seed)].mean(axis=1)
    return mean_R


def interval(mean_R: NDArray[Any]) -> tuple[float, float]:
    """Bounds of the 95 % interval that resampled means give."""
    low, high = np.percentile(mean_R, INTERVAL)
    return float(low), float(high)
