"""What a benchmark consists of, and the parts that the prompts of several benchmarks share."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from string import ascii_uppercase
from typing import Any

from atr.core.records import Example, Question
from atr.core.typed_json import short

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
"""LLaVA's prompts for a short answer and for the letter of a choice, word for word as in its training."""


@dataclass(frozen=True)
class HubDataset:
    """Parquet files of one split of a dataset, on the Hugging Face hub or in a folder of the same layout."""

    hub: str
    """org/name, or org/name@revision."""
    files: str
    """Glob pattern of the parquet files that hold the rows."""
    images: str = ""
    """Glob pattern of a second table with columns `id` and `image`, for rows that only name their image."""
    image_key: str = ""
    """Column of the rows that names the image by its `id` in that table."""


@dataclass(frozen=True)
class DrawingModule:
    """A Python module that draws the questions, imported by its dotted name; see atr.datasets.drawn."""

    module: str


@dataclass(frozen=True)
class Benchmark:
    """A benchmark's file, imported: its group, the source of its rows, and its two functions."""

    name: str
    group: str
    """text or general, the paper's two groups of benchmarks."""
    source: HubDataset | DrawingModule
    examples_of: Callable[[Iterable[Mapping[str, Any]]], Iterable[Example]]
    score_of: Callable[[str, Question], float]

    def examples(self, rows: Iterable[Mapping[str, Any]]) -> Iterator[Example]:
        """Read the rows of the dataset; raises ValueError naming the benchmark if an example is not valid."""
        try:
            for example in self.examples_of(rows):
                if not _is_valid(example):
                    allowed = "an Example with texts as id and unit and a list of images"
                    raise ValueError(f"{self.name}: examples() gave {short(example)}, allowed: {allowed}")
                yield example
        except (ValueError, OSError):  # already in one line
            raise
        except Exception as error:
            raise ValueError(f"{self.name}: examples() raised {type(error).__name__}: {error}") from error

    def score(self, prediction: str, question: Question) -> float:
        """Score one prediction; raises ValueError naming the benchmark unless the score is in 0..1."""
        try:
            score = self.score_of(prediction, question)
        except Exception as error:
            raise ValueError(
                f"{self.name}: score() of {short(prediction)} raised {type(error).__name__}: {error}"
            ) from error
        if not (isinstance(score, Real) and 0 <= score <= 1):
            raise ValueError(
                f"{self.name}: score() of {short(prediction)} is {short(score)}, allowed: a number in 0..1"
            )
        return float(score)


def letter_choices(choices: Sequence[str]) -> str:
    r"""One line per choice, each after its letter.

    >>> letter_choices(["cat", "dog"])
    'A. cat\nB. dog'
    """
    return "\n".join(f"{letter}. {choice}" for letter, choice in zip(ascii_uppercase, choices, strict=False))


def _is_valid(example: object) -> bool:
    """Whether this is an Example with usable fields; its texts are checked once it becomes a Question."""
    if not isinstance(example, Example):
        return False
    texts = (example.id, example.unit)
    return all(isinstance(text, str) for text in texts) and isinstance(example.images, list | tuple)
