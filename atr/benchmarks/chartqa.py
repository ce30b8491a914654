"""ChartQA (Masry et al., 2022, arXiv 2203.10244), test: 2,500 questions on charts, half by humans.

Dataset, prompt and score as task chartqa of lmms-eval 0.3.5: relaxed accuracy over both halves.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from atr.benchmarks.base import HubDataset
from atr.benchmarks.metrics import relaxed_accuracy
from atr.core.records import Example, Question

GROUP = "text"
SOURCE = HubDataset("lmms-lab/ChartQA", "data/test-*.parquet")
_WORD = "\nAnswer the question with a single word."


def examples(rows: Iterable[Mapping[str, Any]]) -> Iterator[Example]:
    """One question per row, with the row's number as id, as the dataset has none."""
    for number, row in enumerate(rows):
        yield Example(f"{number:06d}", row["question"] + _WORD, [row["answer"]], [row["image"]])


def score(prediction: str, question: Question) -> float:
    """Relaxed accuracy with a tolerance of 5 %."""
    return relaxed_accuracy(prediction, question.answers)
