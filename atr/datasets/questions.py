"""Evaluation questions on disk: one JSON object a line."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from atr.files import write_text

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


def save_questions(folder: Path, questions: Iterable[Question]) -> None:
    """Write `questions.jsonl` into the folder, whole or not at all."""
    lines = (json.dumps(asdict(question), ensure_ascii=False) for question in questions)
    write_text(Path(folder) / FILE, "".join(line + "\n" for line in lines))


def load_questions(folder: Path) -> list[Question]:
    """Read the folder's questions; raises ValueError naming file and line of what is no question."""
    path = Path(folder) / FILE
    if not path.is_file():
        raise ValueError(f"{path} is missing; the stage prepare writes it")
    # Not splitlines(): it breaks a question at the line separators that Unicode allows inside a JSON string.
    lines = path.read_bytes().removesuffix(b"\n").split(b"\n")
    return [_parse(path, number, line) for number, line in enumerate(lines, 1)]


def _parse(path: Path, number: int, line: bytes) -> Question:
    wanted = {key.name for key in fields(Question)}
    try:
        row = json.loads(line)
    except ValueError as error:  # no JSON, or no UTF-8
        raise ValueError(f"{path} line {number} is not valid JSON: {error}") from None
    if not isinstance(row, dict) or set(row) != wanted or not row["answers"]:
        raise ValueError(f"{path} line {number} is no question with {', '.join(sorted(wanted))}")
    return Question(**row)
