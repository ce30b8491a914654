"""MMMU (Yue et al., 2024, arXiv 2311.16502), validation: 900 college-level questions, some with many images.

Dataset, prompt and answer extraction as task mmmu_val of lmms-eval 0.3.5, which follows the benchmark's own
evaluation: the images come before the text, which still names them `<image 1>`, also where `none` leaves them
out. An open question may have several answers, of which the official evaluation takes any.
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
# What comes before the answer in a sentence; "=" only in the last one.
INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
# With thousands' commas, in scientific notation, plain.
NUMBERS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
)


def examples(rows: Iterable[Mapping[str, Any]]) -> Iterator[Example]:
    """One question a row, with those of its images that its text or its choices name."""
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
    """The strings of a list that the dataset writes as Python code, or the one string that is no list."""
    if not (text.startswith("[") and text.endswith("]")):
        return [text]
    try:
        values = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return [text]
    return [str(value) for value in values]


def score(prediction: str, question: Question) -> float:
    """1.0 if the letter found in the answer to a multiple choice, or the open answer, is right, else 0.0."""
    if question.choices:
        return float(parse_choice(prediction, question.choices) == question.answers[0])
    return float(_is_right(parse_open(prediction), question.answers))


def parse_choice(prediction: str, choices: Sequence[str]) -> str:
    """The letter that an answer gives: the last of those in the first way of writing that any is found in.

    These are (A), A with a space, A with a full stop, and in an answer of more than five words the text of
    the choice. One that gives none is a guess, as in the official evaluation; ours is always the same.
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
    """The short texts and the numbers, to two decimals, that an answer to an open question may mean."""
    # The official evaluation lowers the case before it looks for the capital that starts a sentence, so that
    # only line ends part an answer.
    *lines, last = prediction.strip().strip(".").lower().split("\n")
    tails = [*(_tail(line, INDICATORS) for line in lines), _tail(last, (*INDICATORS, "="))]
    meant = [tail for tail in tails if tail and tail not in list(":,.!?;'")] or ["\n".join([*lines, last])]
    numbers = [number for tail in meant for pattern in NUMBERS for number in re.findall(pattern, tail)]
    return {value for text in [*meant, *numbers] for value in _values(text)}


def _tail(line: str, indicators: Sequence[str]) -> str:
    """The shortest text that follows the last of an indicator, empty if the line has none."""
    shortest = ""
    for indicator in indicators:
        tail = line.split(indicator)[-1].strip()
        if indicator in line and (not shortest or len(tail) < len(shortest)):
            shortest = tail
    return shortest


def _values(text: str) -> list[str | float]:
    """A number to two decimals, or the text in lower case; one letter with a space, so that it is a word."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        lowered = text.lower()
        return [f" {lowered}", f"{lowered} "] if len(lowered) == 1 else [lowered]


def _is_right(meant: Iterable[str | float], answers: Iterable[str]) -> bool:
    """Whether a number is an answer, or an answer is part of a text."""
    right = [value for answer in answers for value in _values(answer)]
    return any(
        any(isinstance(value, str) and value in said for value in right)
        if isinstance(said, str)
        else said in right
        for said in meant
    )
