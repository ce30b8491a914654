"""MMBench (Liu et al., 2023, arXiv 2307.06281), English dev: 4,329 rows of multiple choices.

Dataset and prompt as task mmbench_en_dev of lmms-eval 0.3.5. CircularEval: the rows of one question differ in
the order of the choices, and the question is right only if all of its rows are. The letter or choice is
extracted from an answer by the rules of lmms-eval, with two differences: where the rules find none, lmms-eval
asks a GPT and this file scores 0; and an empty choice, whose text is "nan" there, is no option here.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from atr.benchmarks.base import LETTER, HubDataset
from atr.core.records import Example, Question

GROUP = "text"
SOURCE = HubDataset("lmms-lab/MMBench", "en/dev-*.parquet")
ROTATION = 1_000_000
"""Rows whose `index` is equal modulo this are the same question."""
LETTERS = "ABCDE"
# Characters before and after a letter that stands alone; the first pair is empty, for the bare letter.
WRITTEN = [
    *(("", ""), ("", "."), ("", ","), ("", ":"), ("", ")"), ("", ")."), ("(", ")"), ("(", ").")),
    *((":", ""), (":", ","), (":", "."), (":", ")"), (":", ").")),
]


def examples(rows: Iterable[Mapping[str, Any]]) -> Iterator[Example]:
    """One question per row, with its index as id; the rotations of a question are a unit.

    A choice keeps its letter if the choice before it is empty, as it may be after a rotation.
    """
    for row in rows:
        choices = [str(row[letter]) if _given(row.get(letter)) else "" for letter in LETTERS]
        lines = [f"{letter}. {text}" for letter, text in zip(LETTERS, choices, strict=True) if text]
        hint = f"{row['hint']} " if _given(row["hint"]) else ""
        options = "\n".join(["There are several options:", *lines])
        question = f"{hint}{row['question']} {options}\n{LETTER}"
        index = int(row["index"])
        yield Example(
            str(index), question, [row["answer"]], [row["image"]], choices, unit=str(index % ROTATION)
        )


def score(prediction: str, question: Question) -> float:
    """1.0 if the answer has the right letter or, without a letter, the right choice; else 0.0."""
    letter = letter_in(prediction) or choice_in(prediction, question.choices)
    return float(letter == question.answers[0])


def letter_in(prediction: str) -> str | None:
    """The only letter of A to E that stands alone in an answer; None if there is none or more than one.

    Bare letters are not counted in an answer of more than three words with "A", possibly the article.
    """
    words = prediction.split()
    for before, after in WRITTEN:
        letters = [letter for letter in LETTERS if f"{before}{letter}{after}" in words]
        is_article = not before + after and "A" in words and len(words) > 3
        if len(letters) == 1 and not is_article:
            return letters[0]
    return None


def choice_in(prediction: str, choices: Sequence[str]) -> str | None:
    """The letter of the only choice that occurs in an answer, up to case; None if not exactly one does."""
    text = prediction.lower()
    lettered = zip(LETTERS, choices, strict=False)
    letters = [letter for letter, choice in lettered if choice and choice.lower() in text]
    return letters[0] if len(letters) == 1 else None


def _given(value: str | None) -> bool:
    """Whether a cell contains a text; the dataset writes `nan` into empty cells."""
    return value not in (None, "", "nan")
