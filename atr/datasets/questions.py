"""Evaluation questions on disk: one JSON object a line."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from atr.core import catalog
from atr.core.files import write_text
from atr.core.typed_json import records, short

FILE = "questions.jsonl"


@dataclass(frozen=True)
class Question:
    """One question about an image (several, or none), with all that scoring it needs."""

    id: str
    benchmark: str
    group: str
    images: list[str]
    """Ids of its images among the prepared ones, in the order of the prompt."""
    question: str
    answers: list[str]
    """Every answer that counts as right, or one of each annotator; of a multiple choice, its letter."""
    choices: list[str] = field(default_factory=list)
    """Texts of a multiple choice in the order of their letters; none if the question is open."""
    unit: str = ""
    """Questions of one unit count as right only together; empty if the question counts alone."""
    unreadable: str = ""
    """Why its images could not be read; it is counted, and not asked."""

    def __post_init__(self) -> None:
        """Raise ValueError naming the key that is not allowed."""
        if not self.id:
            raise ValueError("id: '' is not allowed, allowed: a name of its own")
        if self.group != (group := catalog.benchmark_group(self.benchmark)):
            raise ValueError(f"group: {short(self.group)} is not {self.benchmark}'s, allowed: {group}")
        if not self.answers:
            raise ValueError("answers: [] is not allowed, allowed: one text or more")


def save_questions(folder: Path, questions: Iterable[Question]) -> None:
    """Write `questions.jsonl` into the folder, whole or not at all."""
    lines = (json.dumps(asdict(question), ensure_ascii=False) for question in questions)
    write_text(Path(folder) / FILE, "".join(line + "\n" for line in lines))


def load_questions(folder: Path) -> list[Question]:
    """Read the folder's questions; raises ValueError naming file, line and key of what is no question."""
    path = Path(folder) / FILE
    if not path.is_file():
        raise ValueError(f"{path} is missing; the stage prepare writes it")
    lines: dict[str, int] = {}
    questions = list(records(Question, path, exact=True))
    for number, question in enumerate(questions, start=1):
        if (first := lines.setdefault(question.id, number)) != number:
            raise ValueError(
                f"{path} line {number}: id: {short(question.id)} is that of line {first} as well"
            )
    return questions
