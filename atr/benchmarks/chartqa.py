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
WORD = "\nAnswer the question with a single word."


def examples(rows: Iterable[Mapping[str, Any]]) -> Iterator[Example]:
    """One question a row; the dataset has no ids, so the row's number serves."""
    for number, row in enumerate(rows):
        yield Example(f"{number:06d}", row["question"] + WORD, [row["answer"]], [row["image"]])


def score(prediction: str, question: Question) -> float:
    """Relaxed accuracy, 5 % of the number."""
    return relaxed_accuracy(prediction, question.answers)
