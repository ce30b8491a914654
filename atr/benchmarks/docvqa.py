"""DocVQA (Mathew et al., 2021, arXiv 2007.00398), validation: 5,349 questions on scanned pages.

Dataset, prompt and score as task docvqa_val of lmms-eval 0.3.5, but for a distance of exactly one half and
for texts with repeated blanks: see `anls`.
"""

from collections.abc import Iterable, Iterator

from atr.benchmarks.base import SHORT, Asked, Example, Row, Source
from atr.benchmarks.metrics import anls

SOURCE = Source("lmms-lab/DocVQA", "DocVQA/validation-*.parquet")


def examples(rows: Iterable[Row]) -> Iterator[Example]:
    """One question a row, with every answer that was given."""
    for row in rows:
        yield Example(str(row["questionId"]), row["question"] + SHORT, list(row["answers"]), [row["image"]])


def score(prediction: str, asked: Asked) -> float:
    """ANLS."""
    return anls(prediction, asked.answers)
