"""TextVQA (Singh et al., 2019, arXiv 1904.08920), validation: 5,000 questions on text in photographs.

Dataset, prompt and score as task textvqa_val of lmms-eval 0.3.5, without the list of OCR tokens.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from atr.benchmarks.base import SHORT, HubDataset
from atr.benchmarks.vqa import vqa_accuracy
from atr.core.records import Example, Question

GROUP = "text"
SOURCE = HubDataset("lmms-lab/textvqa", "data/validation-*.parquet")


def examples(rows: Iterable[Mapping[str, Any]]) -> Iterator[Example]:
    """One question per row, with the answers of ten annotators."""
    for row in rows:
        # As in lmms-eval, capitalize() also lowers the case of all but the first letter.
        question = row["question"].capitalize() + SHORT
        yield Example(str(row["question_id"]), question, list(row["answers"]), [row["image"]])


def score(prediction: str, question: Question) -> float:
    """VQA accuracy against the ten annotators."""
    return vqa_accuracy(prediction, question.answers)
