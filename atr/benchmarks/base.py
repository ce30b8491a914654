"""What a file of atr/benchmarks says about its questions, and the parts that their prompts share."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

from atr.core.records import Example, Question

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
"""LLaVA's requests for a short answer and for the letter of a choice, in the words it was trained on."""


@dataclass(frozen=True)
class Source:
    """Where the dataset lies: parquet files of a split in a repository of datasets, on the hub by this id."""

    hub: str
    """org/name, or org/name@revision."""
    files: str
    """Glob pattern of the rows' files."""
    images: str = ""
    """Pattern of a second table with `id` and `image`, if the rows name their image in `image_key` only."""
    image_key: str = ""


@dataclass(frozen=True)
class Benchmark:
    """A set of questions: its group in the paper's sense (text or general), and the score of one answer.

    One that is read from a dataset has its source, and examples() to turn rows into questions.
    """

    group: str
    score: Callable[[str, Question], float]
    source: Source | None = None
    examples: Callable[[Iterable[Mapping[str, Any]]], Iterator[Example]] | None = None


def lettered(choices: Sequence[str]) -> str:
    r"""One line for each choice, after its letter.

    >>> lettered(["cat", "dog"])
    'A. cat\nB. dog'
    """
    return "\n".join(f"{letter}. {choice}" for letter, choice in zip(ascii_uppercase, choices, strict=False))
