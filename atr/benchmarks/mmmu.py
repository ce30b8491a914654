"""MMMU (Yue et al., 2024, arXiv 2311.16502), validation: 900 college-level questions, some with many images.

Dataset, prompt and answer extraction as task mmmu_val of lmms-eval 0.3.5, which follows the official
evaluation: the images precede the text, which still refers to them as `<image 1>`, even if reducer `none`
drops them. Any of the several answers of an open question is right.
"""

import ast
import random
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from string import ascii_uppercase
from typing import Any

from atr.benchmarks.base import LETTER, SHORT, HubDataset, letter_choices
from atr.core.records import Example, Question

GROUP = "general"
SOURCE = HubDataset("lmms-lab/MMMU", "data/validation-*.parquet")
# Phrases that precede the answer in a sentence; "=" counts in the last sentence only.
INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
# Numbers with thousands separators, in scientific notation, and plain.
NUMBERS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
)


def examples(rows: Iterable[Mapping[str, Any]]) -> Iterator[Example]:
    """One question per row, with the images that its text or its choices refer to."""
    for row in rows:
        closed = row["question_type"] == "multiple-choice"
        choices = _literals(row["options"]) if closed else []
        text = (
            f"{row['question']}\n{letter_choices(choices)}\n{LETTER}"
            if closed
            else f"{row['question']}\n{SHORT}"
        )
        named = sorted(set(re.findall(r"<image (\d+)>", text)))
        images = [row[f"image_{number}"] for number in named]
        answers = [row["answer"]] if closed else _literals(row["answer"])
        yield Example(str(row["id"]), text, answers, images, choices)


def _literals(text: str) -> list[str]:
    """The strings of a list in Python syntax, as in the dataset; any other text becomes the only string."""
    if not (text.startswith("[") and text.endswith("]")):
        return [text]
    try:
        values = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return [text]
    return [str(value) for value in values]


def score(prediction: str, question: Question) -> float:
    """1.0 if the extracted letter, or the answer to an open question, is right; else 0.0."""
    if question.choices:
        return float(parse_choice(prediction, question.choices) == question.answers[0])
    return float(_is_right(parse_open(prediction), question.answers))


def parse_choice(prediction: str, choices: Sequence[str]) -> str:
    """Extract the letter from an answer to a multiple choice.

    Four notations are tried in turn: (A), A before a space, A before a full stop, and, in answers of more
    than five words, the text of a choice. The last occurrence in the first notation that occurs counts.
    Without any, the letter is a guess as in the official evaluation, but seeded by the answer.
    """
    letters = ascii_uppercase[: len(choices)]
    for mark in ",.!?;:'":
        prediction = prediction.strip(mark)
    text = f" {prediction} "
    for written, place in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
        if found := [letter for letter in letters if written.format(letter) in text]:
            return max(found, key=lambda letter: text.rfind(place.format(letter)))
    if len(text.split()) > 5:
        places = {
            letter: text.lower().rfind(choice.lower())
            for letter, choice in zip(letters, choices, strict=True)
        }
        if max(places.values()) >= 0:
            return max(places, key=lambda letter: places[letter])
    return random.Random(zlib.crc32(prediction.encode())).choice(letters)


def parse_open(prediction: str) -> set[str | float]:
    """Candidate answers in a prediction to an open question: short texts, and numbers to two decimals."""
    # The official evaluation lowers the case before it splits at the capitals that start sentences, so that
    # only line breaks split an answer.
    *lines, last = prediction.strip().strip(".").lower().split("\n")
    tails = [*(_tail(line, INDICATORS) for line in lines), _tail(last, (*INDICATORS, "="))]
    meant = [tail for tail in tails if tail and tail not in list(":,.!?;'")] or ["\n".join([*lines, last])]
    numbers = [number for tail in meant for pattern in NUMBERS for number in re.findall(pattern, tail)]
    return {value for text in [*meant, *numbers] for value in _values(text)}


def _tail(line: str, indicators: Sequence[str]) -> str:
    """The shortest text after the last occurrence of an indicator; empty if the line contains none."""
    shortest = ""
    for indicator in indicators:
        tail = line.split(indicator)[-1].strip()
        if indicator in line and (not shortest or len(tail) < len(shortest)):
            shortest = tail
    return shortest


def _values(text: str) -> list[str | float]:
    """A number to two decimals, or the text in lower case; a single letter is padded so that it is a word."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        lowered = text.lower()
        return [f" {lowered}", f"{lowered} "] if len(lowered) == 1 else [lowered]


def _is_right(meant: Iterable[str | float], answers: Iterable[str]) -> bool:
    """Whether a candidate number equals an answer, or a candidate text contains one."""
    right = [value for answer in answers for value in _values(answer)]
    return any(
        any(isinstance(value, str) and value in said for value in right)
        if isinstance(said, str)
        else said in right
        for said in meant
    )
