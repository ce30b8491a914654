"""Rows of answers on disk: the results of an evaluation, or the part that an interrupted one resumes from."""

import json
from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict, fields
from pathlib import Path

from atr.core.files import write_text
from atr.core.records import Row, Trial
from atr.core.typed_json import parse_record


def save_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write rows atomically, one JSON object per line."""
    write_text(path, "".join(f"{_line(row)}\n" for row in rows))


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
        rows = [row for file in files for row in _whole_lines(file) if row.id in questions]
        return {(Trial(row.keep, row.seed), row.id): row for row in rows}

    def append(self, rows: Iterable[Row]) -> None:
        """Append the rows of one batch; an interruption while writing costs this batch alone."""
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with open(self._file, "a", encoding="utf-8") as file:
            # The leading line break ends a line that an interruption has cut off.
            file.write("".join(f"\n{_line(row)}" for row in rows) + "\n")

    def remove_others(self) -> None:
        """Remove the rows of other evaluations in the same folder.

        The rows of this one stay until another evaluation finishes, in case its results are lost.
        """
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
