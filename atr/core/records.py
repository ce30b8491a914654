"""Records shared by several packages: questions, the settings they are answered under, and answers."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

ANSWERED, UNREADABLE, FAILED = STATUSES = ("answered", "unreadable", "failed")
"""Outcome of a question: answered, skipped because its image is unreadable, or generation failed."""


@dataclass(frozen=True)
class Example:
    """One question that a benchmark's file makes of a row; the prompt has no chat template yet."""

    id: str
    """Unique within the benchmark."""
    question: str
    answers: list[str]
    images: list[Any]
    """Its images in the order of the prompt, not yet decoded: cells of a parquet file or drawn pictures."""
    choices: list[str] = field(default_factory=list)
    unit: str = ""
    """Name shared by the examples that count as right only together; empty if the example counts alone."""


@dataclass(frozen=True)
class Question:
    """One question about an image (several, or none), with everything that scoring needs."""

    id: str
    benchmark: str
    """Name of a benchmark: its file in atr/benchmarks, or the path of the user's own file without `.py`."""
    group: str
    """The benchmark's group: text or general."""
    images: list[str]
    """Ids of the prepared images, in the order of the prompt."""
    question: str
    answers: list[str]
    """Every right answer, or one answer per annotator; the letter of the right option if multiple choice."""
    choices: list[str] = field(default_factory=list)
    """Texts of the options in the order of their letters; empty if the question is not multiple choice."""
    unit: str = ""
    """Name shared by the questions that count as right only together; empty if the question counts alone."""
    unreadable: str = ""
    """Why an image cannot be read; such a question counts but is not asked. Empty if all can be read."""

    def __post_init__(self) -> None:
        """Raise ValueError naming the key that is not allowed."""
        if not self.id:
            raise ValueError("id: '' is not allowed, allowed: a name of its own")
        if not self.answers:
            raise ValueError("answers: [] is not allowed, allowed: one text or more")


@dataclass(frozen=True)
class Trial:
    """One setting under which all questions are answered."""

    keep: float | None
    """Kept fraction of the visual tokens; None if the reducer chooses a count for each image."""
    seed: int | None = None
    """Seed of a random reducer; None for a deterministic one."""


class Reply(NamedTuple):
    """The prediction for one question, and its numbers of visual tokens."""

    prediction: str
    tokens: int
    """Visual tokens kept; if the language model drops tokens, the mean over its layers."""
    tokens_fed: int
    """Kept tokens plus the newlines fed with them; if the language model drops tokens, the mean over its
    layers."""
    tokens_full: int
    """Visual tokens without reduction."""


@dataclass(frozen=True)
class Row:
    """One question answered under one trial.

    Token counts are those of `Reply`. Unless the status is `answered`, the scores are None and `error` says
    why.
    """

    id: str
    benchmark: str
    group: str
    question: str
    answers: Sequence[str]
    keep: float | None
    seed: int | None
    tokens: int
    tokens_fed: int
    tokens_full: int
    prediction: str
    score: float | None
    """The benchmark's own score, in 0..1."""
    anls: float | None
    """ANLS of the prediction, in 0..1."""
    status: str = ANSWERED
    """One of STATUSES."""
    error: str = ""
    images: Sequence[str] = field(default_factory=list)
    choices: Sequence[str] = field(default_factory=list)
    unit: str = ""

    @property
    def image(self) -> str:
        """The first of `images`, empty if there is none."""
        return next(iter(self.images), "")

    @property
    def answer(self) -> str:
        """The first of `answers`."""
        return self.answers[0]
