"""Evaluation questions on disk: one JSON object a line."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from atr.files import write_text

FILE = "questions.jsonl"


@dataclass(frozen=True)
class Question:
    """One question about one image, with every answer that counts as right."""

    id: str
    benchmark: str
    group: str
    image: str
    """Id of its image among the prepared ones."""
    question: str
    answers: list[str]


def save_questions(folder: Path, questions: Iterable[Question]) -> None:
    """Write `questions.jsonl` into the folder, whole or not at all."""
    lines = (json.dumps(asdict(question), ensure_ascii=False) for question in questions)
    write_text(Path(folder) / FILE, "".join(line + "\n" for line in lines))


def load_questions(folder: Path) -> list[Question]:
    """Read the folder's questions; raises ValueError naming file and line of what is no question."""
    path = Path(folder) / FILE
    if not path.is_file():
        raise ValueError(f"{path} is missing; the stage prepare writes it")
    return [_parse(path, number, line) for number, line in enumerate(path.read_text().splitlines(), 1)]


def _parse(path: Path, number: int, line: str) -> Question:
    wanted = {field.name for field in fields(Question)}
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} line {number} is not valid JSON: {error}") from None
    if not isinstance(row, dict) or set(row) != wanted or not row["answers"]:
        raise ValueError(f"{path} line {number} is no question with {', '.join(sorted(wanted))}")
    return Question(**row)
