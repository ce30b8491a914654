"""DocVQA (Mathew et al., 2021, arXiv 2007.00398), validation: 5,349 questions on scanned pages.

Dataset, prompt and score as task docvqa_val of lmms-eval 0.3.5, except for a distance of exactly one half and
for texts with repeated blanks: see `anls`.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from atr.benchmarks.base import SHORT, HubDataset
from atr.benchmarks.metrics import anls
from atr.core.records import Example, Question

GROUP = "text"
SOURCE = HubDataset("lmms-lab/DocVQA", "DocVQA/validation-*.parquet")


def examples(rows: Iterable[Mapping[str, Any]]) -> Iterator[Example]:
    """One question per row, with all of its answers."""
    for row in rows:
        yield Example(str(row["questionId"]), row["question"] + SHORT, list(row["answers"]), [row["image"]])


def score(prediction: str, question: Question) -> float:
    """ANLS."""
    return anls(prediction, question.answers)
