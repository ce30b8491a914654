import json
from dataclasses import asdict, replace

import pytest

from atr.core.answer_files import AnswerLine, UnfinishedRows, load_rows, save_rows
from atr.core.records import Row, Trial

ROW = Row(
    "docs/0#0",
    "docs",
    "text",
    "total",
    ["17"],
    0.2,
    None,
    3,
    5,
    10,
    '\u2028\n"é',
    1.0,
    0.5,
    images=["a", "b"],
)
ROWS = [replace(ROW, id=f"docs/{number}#0", keep=keep) for number in range(3) for keep in (0.2, None)]


FAILED = replace(ROWS[3], status="failed", error="too long", prediction="", score=None, anls=None)


def test_a_question_is_stored_once_with_its_answers_as_columns(tmp_path):
    save_rows(tmp_path / "results.jsonl", ROWS)
    lines = (tmp_path / "results.jsonl").read_bytes().removesuffix(b"\n").split(b"\n")
    first, *others = map(json.loads, lines)
    assert first == {
        "id": "docs/0#0", "benchmark": "docs", "group": "text", "question": "total", "answers": ["17"],
        "images": ["a", "b"], "keep": [0.2, None], "seed": [None, None], "tokens": [3, 3],
        "tokens_fed": [5, 5], "tokens_full": [10, 10], "prediction": [ROW.prediction] * 2,
        "score": [1.0, 1.0], "anls": [0.5, 0.5],
    }  # fmt: skip
    assert [line["id"] for line in others] == ["docs/1#0", "docs/2#0"]


@pytest.mark.parametrize(
    "rows",
    [
        ROWS,
        [*ROWS[:3], FAILED, *ROWS[4:]],
        [replace(ROW, choices=["a", "b"], unit="docs/0", answers=["A"], images=[])],
    ],
)
def test_saved_rows_are_read_again(tmp_path, rows):
    save_rows(tmp_path / "results.jsonl", rows)
    assert load_rows(tmp_path / "results.jsonl") == rows


def test_rows_are_read_by_question_and_then_by_trial(tmp_path):
    save_rows(tmp_path / "results.jsonl", sorted(ROWS, key=lambda row: row.keep is None))
    assert [(row.id, row.keep) for row in load_rows(tmp_path / "results.jsonl")] == [
        (row.id, row.keep) for row in ROWS
    ]


def test_more_trials_cost_a_fraction_of_the_first(tmp_path):
    """The text of a question does not come again."""
    question = replace(ROW, question="which of them " * 20, choices=["an option"] * 4)
    for trials in (1, 10):
        save_rows(tmp_path / f"{trials}", [replace(question, seed=seed) for seed in range(trials)])
    one, ten = (len((tmp_path / name).read_bytes()) for name in ("1", "10"))
    assert ten < 2 * one


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda line: line.update(score=[1.0]), "score: 1 values are not allowed, allowed: 2, as in keep"),
        (lambda line: line.update(status=["failed"]), "status: 1 values are not allowed, allowed: 2,"),
        (lambda line: line.update(keep=[0.2, 0.2]), r"keep and seed: .*0\.2, None.* occurs twice, allowed: "),
        (lambda line: line.update(answers=[]), r"answers: \[\] is not allowed, allowed: one text or more"),
        (lambda line: line.update(tokens=[3, "3"]), r"tokens\[1\]: '3' is not allowed, allowed: int"),
        (lambda line: line.pop("seed"), "seed is missing, allowed: "),
        (lambda line: line.update(id="docs/0#0"), "question docs/0#0 occurs twice"),
    ],
)
def test_a_broken_line_is_named(tmp_path, spoil, message):
    path = tmp_path / "results.jsonl"
    save_rows(path, ROWS)
    lines = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
    spoil(lines[1])
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    with pytest.raises(ValueError, match=rf"results\.jsonl line 2: {message}"):
        load_rows(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"results\.jsonl is missing"):
        load_rows(tmp_path / "results.jsonl")


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
    unfinished.append(ROWS[:4])
    file = tmp_path / "abc.0.jsonl"
    file.write_bytes(file.read_bytes()[:-20])
    unfinished.append(ROWS[4:])
    assert list(unfinished.load({row.id for row in ROWS}).values()) == [*ROWS[:2], *ROWS[4:]]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda line: line | {"tokens": "3"}, r"tokens: '3' is not allowed, allowed: list\[int\]"),
        (lambda line: line | {"images": "docs/1"}, "images: 'docs/1' is not allowed, allowed: "),
        (lambda line: line | {"score": [float("nan")]}, r"score\[0\]: nan is not allowed"),
        (lambda line: [line], r"\[\{.* is not allowed, allowed: a JSON object"),
    ],
)
def test_an_unfinished_line_that_is_no_answer_is_named(tmp_path, spoil, message):
    (tmp_path / "abc.0.jsonl").write_text(json.dumps(spoil(asdict(AnswerLine.of([ROW])))))
    with pytest.raises(ValueError, match=rf"abc\.0\.jsonl line 1: {message}"):
        UnfinishedRows(tmp_path / "abc").load({ROW.id})


def test_rows_of_other_evaluations_are_removed(tmp_path):
    for name in ("abc", "abcd", "xyz"):
        UnfinishedRows(tmp_path / name).append(ROWS)
    UnfinishedRows(tmp_path / "abc").remove_others()
    assert [file.name for file in tmp_path.iterdir()] == ["abc.0.jsonl"]
