"""ScienceQA (Lu et al., 2022, arXiv 2209.09513), test questions with an image: 2,017 multiple choices.

Dataset, prompt and answer extraction as task scienceqa_img of lmms-eval 0.3.5.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from string import ascii_uppercase
from typing import Any

from atr.benchmarks.base import LETTER, HubDataset, letter_choices
from atr.benchmarks.metrics import exact_match
from atr.core.records import Example, Question

GROUP = "general"
SOURCE = HubDataset("lmms-lab/ScienceQA", "ScienceQA-IMG/test-*.parquet")


def examples(rows: Iterable[Mapping[str, Any]]) -> Iterator[Example]:
    """One question per row, after its hint, with the row's number as id, as the dataset has none."""
    for number, row in enumerate(rows):
        context = f"Context: {row['hint']}\n" if row["hint"] else ""
        choices = list(row["choices"])
        question = f"{context}{row['question']}\n{letter_choices(choices)}{LETTER}"
        yield Example(f"{number:06d}", question, [ascii_uppercase[row["answer"]]], [row["image"]], choices)


def score(prediction: str, question: Question) -> float:
    """Exact match of the letter before a full stop at the start of the answer, else of the whole answer."""
    starting = re.match(r"\s*([A-Z])\.", prediction)
    return exact_match(starting[1] if starting else prediction, question.answers)
