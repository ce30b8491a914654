"""Benchmarks: their group, how their answers are scored, and the loop that all of them run through.

The paper's ten lie one in a file, each with the source of its dataset, examples() and score(); those of the
micro world are drawn, not read, and scored by exact match.
"""

from atr.benchmarks import ai2d, chartqa, docvqa, gqa, infovqa, mmbench, mmmu, mmstar, scienceqa, textvqa
from atr.benchmarks.base import Benchmark, Source
from atr.benchmarks.metrics import exact_match
from atr.core.records import Question

__all__ = ["BENCHMARKS", "Benchmark", "Source"]


def _exact(prediction: str, question: Question) -> float:
    return exact_match(prediction, question.answers)


BENCHMARKS = {
    "docs": Benchmark("text", _exact),
    "signs": Benchmark("text", _exact),
    "charts": Benchmark("text", _exact),
    "shapes": Benchmark("general", _exact),
    "digits": Benchmark("general", _exact),
    "scenes": Benchmark("general", _exact),
    "textvqa": Benchmark("text", textvqa.score, textvqa.SOURCE, textvqa.examples),
    "docvqa": Benchmark("text", docvqa.score, docvqa.SOURCE, docvqa.examples),
    "infovqa": Benchmark("text", infovqa.score, infovqa.SOURCE, infovqa.examples),
    "chartqa": Benchmark("text", chartqa.score, chartqa.SOURCE, chartqa.examples),
    "mmbench": Benchmark("text", mmbench.score, mmbench.SOURCE, mmbench.examples),
    "ai2d": Benchmark("general", ai2d.score, ai2d.SOURCE, ai2d.examples),
    "gqa": Benchmark("general", gqa.score, gqa.SOURCE, gqa.examples),
    "mmmu": Benchmark("general", mmmu.score, mmmu.SOURCE, mmmu.examples),
    "mmstar": Benchmark("general", mmstar.score, mmstar.SOURCE, mmstar.examples),
    "scienceqa": Benchmark("general", scienceqa.score, scienceqa.SOURCE, scienceqa.examples),
}
