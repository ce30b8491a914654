"""GQA (Hudson and Manning, 2019, arXiv 1902.09506), balanced testdev: 12,578 questions on 398 photographs.

Dataset, prompt and score as task gqa of lmms-eval 0.3.5; the images are in a second table.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from atr.benchmarks.base import SHORT, HubDataset
from atr.benchmarks.metrics import exact_words
from atr.core.records import Example, Question

GROUP = "general"
SOURCE = HubDataset(
    "lmms-lab/GQA",
    "testdev_balanced_instructions/testdev-*.parquet",
    images="testdev_balanced_images/testdev-*.parquet",
    image_key="imageId",
)


def examples(rows: Iterable[Mapping[str, Any]]) -> Iterator[Example]:
    """One question per row, with its short answer."""
    for row in rows:
        yield Example(str(row["id"]), row["question"] + SHORT, [row["answer"]], [row["image"]])


def score(prediction: str, question: Question) -> float:
    """Exact match up to case and punctuation."""
    return exact_words(prediction, question.answers)
