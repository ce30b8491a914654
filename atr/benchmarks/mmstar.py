"""MMStar (Chen et al., 2024, arXiv 2403.20330): 1,500 multiple choices that cannot be guessed from the text.

Dataset, prompt and answer extraction as task mmstar of lmms-eval 0.3.5; later versions extract the letter
from more answers. The score is the mean over questions, which equals the mean over the paper's six dimensions
of 250 questions each; lmms-eval averages 18 finer categories.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from atr.benchmarks.base import LETTER, HubDataset
from atr.core.records import Example, Question

GROUP = "general"
SOURCE = HubDataset("Lin-Chen/MMStar", "mmstar.parquet")
# The letter at the start of the answer, or after one of three phrases there.
_LETTER_PLACE = re.compile(r"(?:the answer is |option |\()?(.)", re.DOTALL)


def examples(rows: Iterable[Mapping[str, Any]]) -> Iterator[Example]:
    """One question per row, whose text contains the choices; the request has no full stop here."""
    for row in rows:
        text = row["question"].strip().replace(" Please answer yes or no.", "")
        yield Example(str(row["index"]), text + LETTER.rstrip("."), [row["answer"]], [row["image"]])


def score(prediction: str, question: Question) -> float:
    """1.0 if the answer starts with the right letter, or with it after one of the phrases; else 0.0."""
    text = prediction.lower().replace("\n", " ").strip()
    right = question.answers[0].lower().strip()
    stated = _LETTER_PLACE.match(text)
    return float(text[:1] == right or (stated is not None and stated[1] == right))
