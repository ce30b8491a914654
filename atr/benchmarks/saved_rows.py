"""Rows of answers, and how they are kept: whole, and before an evaluation is finished."""

import json
from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict, fields
from pathlib import Path

from atr.core.files import write_text
from atr.core.records import Row, Trial
from atr.core.typed_json import parse_record


def save_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write rows as one JSON object a line, whole or not at all."""
    write_text(path, "".join(f"{_line(row)}\n" for row in rows))


class Unfinished:
    """The rows of whole batches, appended to one file by each process: stopped, an evaluation goes on behind.

    `path`, a file name without suffix, says all that an answer depends on; under another one none is found.
    """

    def __init__(self, path: Path, rank: int = 0) -> None:
        self.path, self._own = path, path.with_name(f"{path.name}.{rank}.jsonl")

    def rows(self, questions: Collection[str]) -> dict[tuple[Trial, str], Row]:
        """What any process answered of the questions of these names; ValueError for a line that is no row."""
        files = self.path.parent.glob(f"{self.path.name}.*.jsonl")
        found = [row for file in files for row in _whole_lines(file) if row.id in questions]
        return {(Trial(row.keep, row.seed), row.id): row for row in found}

    def add(self, rows: Iterable[Row]) -> None:
        """Append the rows of a batch; a stop in the midst of it costs that batch alone."""
        self._own.parent.mkdir(parents=True, exist_ok=True)
        with open(self._own, "a", encoding="utf-8") as file:
            # The line break before them ends a line that a stop has cut off.
            file.write("".join(f"\n{_line(row)}" for row in rows) + "\n")

    def remove_others(self) -> None:
        """Remove what other evaluations have left here; what is made of these rows may yet be lost."""
        for file in self.path.parent.glob("*.jsonl"):
            if not file.name.startswith(f"{self.path.name}."):
                file.unlink()


def _line(row: Row) -> str:
    return json.dumps(asdict(row), ensure_ascii=False)


def _whole_lines(file: Path) -> Iterator[Row]:
    names = {field.name for field in fields(Row)}
    for number, line in enumerate(file.read_bytes().split(b"\n"), start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # empty, or cut off
            continue
        if not isinstance(row, dict) or row.keys() == names:
            yield parse_record(Row, row, f"{file} line {number}")
