"""Answers on disk: the results of an evaluation, or the part that an interrupted one resumes from.

Each line is a question with its answers under all trials, so that its text is stored once, however often it
is answered.
"""

import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from atr.core.files import write_text
from atr.core.records import ANSWERED, Row, Trial
from atr.core.typed_json import check_distinct, parse_record, read_records


@dataclass(frozen=True)
class AnswerLine:
    """One line: the fields of a question, and those of its answers as columns, one value per trial.

    See `Row` for the fields. `status` and `error` are empty if the question is answered under every trial.
    """

    id: str
    benchmark: str
    group: str
    question: str
    answers: list[str]
    images: list[str]
    keep: list[float | None]
    seed: list[int | None]
    tokens: list[int]
    tokens_fed: list[int]
    tokens_full: list[int]
    prediction: list[str]
    score: list[float | None]
    anls: list[float | None]
    choices: list[str] = field(default_factory=list)
    unit: str = ""
    status: list[str] = field(default_factory=list)
    error: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Raise ValueError for a question without answers, a column of another length, or equal trials."""
        if not self.answers:
            raise ValueError("answers: [] is not allowed, allowed: one text or more")
        for name in _COLUMNS:
            values, expected = len(getattr(self, name)), len(self.keep)
            if values != expected and (values or name not in _OPTIONAL):
                raise ValueError(f"{name}: {values} values are not allowed, allowed: {expected}, as in keep")
        check_distinct("keep and seed", [str(trial) for trial in zip(self.keep, self.seed, strict=True)])

    @classmethod
    def of(cls, rows: Sequence[Row]) -> "AnswerLine":
        """The line of one question's rows."""
        content: dict[str, Any] = {name: getattr(rows[0], name) for name in _QUESTION}
        content |= {name: [getattr(row, name) for row in rows] for name in _COLUMNS}
        if all(row.status == ANSWERED for row in rows):
            content |= {name: [] for name in _OPTIONAL}
        return cls(**content)

    @property
    def rows(self) -> list[Row]:
        """One row per trial."""
        question = {name: getattr(self, name) for name in _QUESTION}
        names = [name for name in _COLUMNS if getattr(self, name)]
        columns = zip(*(getattr(self, name) for name in names), strict=True)
        return [Row(**question, **dict(zip(names, values, strict=True))) for values in columns]

    def dumps(self) -> str:
        """The line as JSON, without empty optional fields."""
        content = {name: getattr(self, name) for name in _FIELDS}
        return json.dumps(
            {name: value for name, value in content.items() if value or name in _REQUIRED}, ensure_ascii=False
        )


_QUESTION = ("id", "benchmark", "group", "question", "answers", "images", "choices", "unit")
_FIELDS = tuple(field.name for field in fields(AnswerLine))
_COLUMNS = tuple(name for name in _FIELDS if name not in _QUESTION)
_OPTIONAL = ("status", "error")
_REQUIRED = frozenset(_FIELDS) - {"choices", "unit", *_OPTIONAL}


def save_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write rows atomically, one line per question in order of first appearance."""
    write_text(path, "".join(f"{line}\n" for line in _lines(rows)))


def load_rows(path: Path) -> list[Row]:
    """The rows of a file by question, then by trial; raises ValueError as `read_lines`."""
    return [row for _, line in read_lines(path) for row in line.rows]


def read_lines(path: Path) -> Iterator[tuple[str, AnswerLine]]:
    """The lines of a file, each with its place for error messages.

    Raises ValueError naming file, line and key for a line that is invalid or whose question occurs twice.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    seen: set[str] = set()
    for number, line in enumerate(read_records(AnswerLine, path), start=1):
        where = f"{path} line {number}"
        if line.id in seen:
            raise ValueError(f"{where}: question {line.id} occurs twice")
        seen.add(line.id)
        yield where, line


class UnfinishedRows:
    """The rows of an unfinished evaluation: an interrupted one resumes after the last finished batch.

    Each process appends to its own file `<path>.<rank>.jsonl`. The name in `path` is a hash of everything
    that an answer depends on, so that rows of other parameters or other code are never resumed from.
    """

    def __init__(self, path: Path, rank: int = 0) -> None:
        self.path, self._file = path, path.with_name(f"{path.name}.{rank}.jsonl")

    def load(self, questions: Collection[str]) -> dict[tuple[Trial, str], Row]:
        """Rows of the questions with these ids, from all processes; raises ValueError for an invalid line."""
        files = self.path.parent.glob(f"{self.path.name}.*.jsonl")
        lines = (line for file in files for line in _whole_lines(file) if line.id in questions)
        return {(Trial(row.keep, row.seed), row.id): row for line in lines for row in line.rows}

    def append(self, rows: Iterable[Row]) -> None:
        """Append the rows of one batch; an interruption while writing costs this batch alone."""
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with open(self._file, "a", encoding="utf-8") as file:
            # The leading line break ends a line that an interruption has cut off.
            file.write("".join(f"\n{line}" for line in _lines(rows)) + "\n")

    def remove_others(self) -> None:
        """Remove the rows of other evaluations in the same folder.

        The rows of this one stay until another evaluation finishes, in case its results are lost.
        """
        for file in self.path.parent.glob("*.jsonl"):
            if not file.name.startswith(f"{self.path.name}."):
                file.unlink()


def _lines(rows: Iterable[Row]) -> Iterator[str]:
    by_question: dict[str, list[Row]] = {}
    for row in rows:
        by_question.setdefault(row.id, []).append(row)
    return (AnswerLine.of(answers).dumps() for answers in by_question.values())


def _whole_lines(file: Path) -> Iterator[AnswerLine]:
    for number, line in enumerate(file.read_bytes().split(b"\n"), start=1):
        try:
            content = json.loads(line)
        except (ValueError, RecursionError):  # empty, or cut off
            continue
        yield parse_record(AnswerLine, content, f"{file} line {number}")
