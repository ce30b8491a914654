"""Benchmarks: their group, how their answers are scored, and the loop that all of them run through."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from atr.benchmarks.metrics import exact_match

__all__ = ["BENCHMARKS", "Benchmark"]


@dataclass(frozen=True)
class Benchmark:
    """A set of questions: its group in the paper's sense (text or general), and the score of one answer."""

    group: str
    score: Callable[[str, Sequence[str]], float]


BENCHMARKS = {
    "docs": Benchmark("text", exact_match),
    "signs": Benchmark("text", exact_match),
    "charts": Benchmark("text", exact_match),
    "shapes": Benchmark("general", exact_match),
    "digits": Benchmark("general", exact_match),
    "scenes": Benchmark("general", exact_match),
}
