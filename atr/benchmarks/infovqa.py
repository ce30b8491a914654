"""InfographicVQA (Mathew et al., 2022, arXiv 2104.12756), validation: 2,801 questions on infographics.

Dataset, prompt and score as task infovqa_val of lmms-eval 0.3.5, except for a distance of exactly one half
and for texts with repeated blanks: see `anls`. The dataset is part of DocVQA's repository.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from atr.benchmarks.base import SHORT, HubDataset
from atr.benchmarks.metrics import anls
from atr.core.records import Example, Question

GROUP = "text"
SOURCE = HubDataset("lmms-lab/DocVQA", "InfographicVQA/validation-*.parquet")


def examples(rows: Iterable[Mapping[str, Any]]) -> Iterator[Example]:
    """One question per row, with all of its answers."""
    for row in rows:
        yield Example(str(row["questionId"]), row["question"] + SHORT, list(row["answers"]), [row["image"]])


def score(prediction: str, question: Question) -> float:
    """ANLS."""
    return anls(prediction, question.answers)
