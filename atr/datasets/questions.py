"""Evaluation questions on disk: one JSON object a line."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from atr.core import catalog
from atr.core.files import write_text
from atr.core.records import Question
from atr.core.typed_json import read_records, short

FILE = "questions.jsonl"


def save_questions(folder: Path, questions: Iterable[Question]) -> None:
    """Write `questions.jsonl` into the folder, whole or not at all."""
    lines = (json.dumps(asdict(question), ensure_ascii=False) for question in questions)
    write_text(Path(folder) / FILE, "".join(line + "\n" for line in lines))


def load_questions(folder: Path) -> list[Question]:
    """Read the folder's questions; raises ValueError naming file, line and key of an invalid line."""
    path = Path(folder) / FILE
    if not path.is_file():
        raise ValueError(f"{path} is missing; the stage prepare writes it")
    lines: dict[str, int] = {}
    questions = list(read_records(Question, path, exact=True))
    for number, question in enumerate(questions, start=1):
        where = f"{path} line {number}"
        if (first := lines.setdefault(question.id, number)) != number:
            raise ValueError(f"{where}: id: {short(question.id)} is that of line {first} as well")
        _check_group(question, where)
    return questions


def _check_group(question: Question, where: str) -> None:
    """Raise ValueError unless the question's benchmark is known and has the question's group."""
    try:
        group = catalog.benchmark_group(question.benchmark)
    except ValueError:
        allowed = f"{', '.join(catalog.benchmarks())}, or the path of a file with a GROUP"
        raise ValueError(
            f"{where}: benchmark: {short(question.benchmark)} is unknown, allowed: {allowed}"
        ) from None
    if question.group != group:
        raise ValueError(
            f"{where}: group: {short(question.group)} is not {question.benchmark}'s, allowed: {group}"
        )
