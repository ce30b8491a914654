"""OCRBench (Liu et al., 2024, arXiv 2305.07895), test: 1,000 questions on ten kinds of text.

Dataset and prompt as task ocrbench of lmms-eval 0.3.5; score as the official evaluation, whose result out of
1,000 is a thousand times the mean. An answer is right if the prediction contains it. lmms-eval lowers the
case of predictions for HME100k as well, where the official evaluation keeps it, so that no formula with a
capital letter can be right there.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from atr.benchmarks.base import HubDataset
from atr.core.records import Example, Question

GROUP = "text"
SOURCE = HubDataset("echo840/OCRBench", "data/test-*.parquet")
FORMULAS = "HME100k"
"""The dataset of handwritten formulas, in which case matters and blanks do not."""


def examples(rows: Iterable[Mapping[str, Any]]) -> Iterator[Example]:
    """One question per row; its id has the kind of text, the dataset and the row's number."""
    for number, row in enumerate(rows):
        name = f"{row['question_type']}/{row['dataset']}/{number:04d}"
        yield Example(name, row["question"].strip(), list(row["answer"]), [row["image"]])


def score(prediction: str, question: Question) -> float:
    """1.0 if the prediction contains one of the answers, else 0.0."""
    plain = _without_blanks if question.id.split("/")[-2] == FORMULAS else _lowered
    said = plain(prediction)
    return float(any(plain(answer) in said for answer in question.answers))


def _lowered(text: str) -> str:
    return text.lower().strip().replace("\n", " ")


def _without_blanks(text: str) -> str:
    """The text without its blanks and line breaks; tabs within it stay, as in the official evaluation."""
    return text.strip().replace("\n", "").replace(" ", "")
