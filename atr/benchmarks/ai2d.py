"""AI2D (Kembhavi et al., 2016, arXiv 1603.07396), test: 3,088 multiple choices on textbook diagrams.

Dataset, prompt and answer extraction as task ai2d of lmms-eval 0.3.5.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from string import ascii_uppercase
from typing import Any

from atr.benchmarks.base import LETTER, HubDataset, letter_choices
from atr.benchmarks.metrics import exact_words
from atr.core.records import Example, Question

GROUP = "general"
SOURCE = HubDataset("lmms-lab/ai2d", "data/test-*.parquet")


def examples(rows: Iterable[Mapping[str, Any]]) -> Iterator[Example]:
    """One question per row, with the row's number as id, as the dataset has none."""
    for number, row in enumerate(rows):
        choices = list(row["options"])
        question = f"{row['question']}\n{letter_choices(choices)}{LETTER}"
        answer = ascii_uppercase[int(row["answer"])]
        yield Example(f"{number:06d}", question, [answer], [row["image"]], choices)


def score(prediction: str, question: Question) -> float:
    """Exact match of the letter before a full stop at the start of the answer, else of the whole answer."""
    starting = re.match(r"\s*([A-Z])\.", prediction)
    return exact_words(starting[1] if starting else prediction, question.answers)
