"""MMStar (Chen et al., 2024, arXiv 2403.20330): 1,500 multiple choices that cannot be guessed from the text.

Dataset, prompt and answer extraction as task mmstar of lmms-eval 0.3.5; later versions find the letter in
more answers. The score is the mean over questions, which is the mean of the paper's six dimensions, as each
has 250; lmms-eval weighs 18 finer ones equally.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from atr.benchmarks.base import LETTER, HubDataset
from atr.core.records import Example, Question

GROUP = "general"
SOURCE = HubDataset("Lin-Chen/MMStar", "mmstar.parquet")
# The places where the letter is looked for, all of them at the start of the answer.
STATED = re.compile(r"(?:the answer is |option |\()?(.)", re.DOTALL)


def examples(rows: Iterable[Mapping[str, Any]]) -> Iterator[Example]:
    """One question a row, whose text holds the choices already; this benchmark's request has no full stop."""
    for row in rows:
        text = row["question"].strip().replace(" Please answer yes or no.", "")
        yield Example(str(row["index"]), text + LETTER.rstrip("."), [row["answer"]], [row["image"]])


def score(prediction: str, question: Question) -> float:
    """1.0 if the right letter is the first one, or follows "(", "option " or "the answer is ", else 0.0."""
    text = prediction.lower().replace("\n", " ").strip()
    right = question.answers[0].lower().strip()
    stated = STATED.match(text)
    return float(text[:1] == right or (stated is not None and stated[1] == right))
