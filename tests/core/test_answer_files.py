import json
from dataclasses import asdict, replace

import pytest

from atr.benchmarks.answer_files import UnfinishedRows, save_rows
from atr.core.records import Row, Trial

ROW = Row("docs/0#0", "docs", "text", "docs/0", "total", "17", 0.2, None, 3, 5, 10, '\u2028\n"é', 1.0, 0.5)
ROWS = [replace(ROW, id=f"docs/{number}#0", keep=keep) for number in range(3) for keep in (0.2, None)]


def test_saved_rows_are_one_object_a_line(tmp_path):
    save_rows(tmp_path / "results.jsonl", ROWS)
    lines = (tmp_path / "results.jsonl").read_bytes().removesuffix(b"\n").split(b"\n")
    assert [Row(**json.loads(line)) for line in lines] == ROWS


def test_rows_of_all_processes_are_loaded_by_trial_and_question(tmp_path):
    path = tmp_path / "new" / "abc"
    UnfinishedRows(path, rank=0).append(ROWS[:2])
    UnfinishedRows(path, rank=1).append(ROWS[2:])
    assert UnfinishedRows(path).load({row.id for row in ROWS}) == {
        (Trial(row.keep, row.seed), row.id): row for row in ROWS
    }
    assert list(UnfinishedRows(path).load({"docs/1#0"}).values()) == ROWS[2:4]
    assert UnfinishedRows(tmp_path / "new" / "ab").load({row.id for row in ROWS}) == {}


def test_a_line_that_was_cut_off_is_left_out_and_spoils_none_behind_it(tmp_path):
    unfinished = UnfinishedRows(tmp_path / "abc")
    unfinished.append(ROWS[:2])
    file = tmp_path / "abc.0.jsonl"
    file.write_bytes(file.read_bytes()[:-20])
    unfinished.append(ROWS[2:4])
    assert list(unfinished.load({row.id for row in ROWS}).values()) == [ROWS[0], *ROWS[2:4]]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda row: row | {"tokens": "3"}, "tokens: '3' is not allowed, allowed: int"),
        (lambda row: row | {"images": "docs/1"}, "images: 'docs/1' is not allowed, allowed: "),
        (lambda row: row | {"score": float("nan")}, "score: nan is not allowed"),
        (lambda row: [row], r"\[\{.* is not allowed, allowed: a JSON object"),
    ],
)
def test_a_line_that_is_no_row_is_named(tmp_path, spoil, message):
    (tmp_path / "abc.0.jsonl").write_text(json.dumps(spoil(asdict(ROW))))
    with pytest.raises(ValueError, match=rf"abc\.0\.jsonl line 1: {message}"):
        UnfinishedRows(tmp_path / "abc").load({ROW.id})


def test_rows_of_other_evaluations_are_removed(tmp_path):
    for name in ("abc", "abcd", "xyz"):
        UnfinishedRows(tmp_path / name).append(ROWS)
    UnfinishedRows(tmp_path / "abc").remove_others()
    assert [file.name for file in tmp_path.iterdir()] == ["abc.0.jsonl"]
