"""The micro world's scenes: a crop of one of twelve photographs; the question is which one."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from atr.benchmarks.base import DrawingModule
from atr.benchmarks.metrics import exact_match
from atr.core.records import Example, Question

GROUP = "general"
SOURCE = DrawingModule("atr.micro.world")


def examples(rows: Iterable[Mapping[str, Any]]) -> Iterator[Example]:
    """One question per image, so that the questions are independent of each other."""
    for row in rows:
        yield Example(row["id"], row["question"], [row["answer"]], [row["image"]])


def score(prediction: str, question: Question) -> float:
    """Exact match up to case and spacing."""
    return exact_match(prediction, question.answers)
