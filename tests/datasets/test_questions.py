import json

import pytest

from atr.core.records import Question
from atr.datasets.questions import load_questions, save_questions

QUESTIONS = [
    Question(f"docs/{i}#0", "docs", "text", [f"docs/{i}"], "name", ["kettle <é>", "7"]) for i in range(3)
]


def test_round_trip(tmp_path):
    save_questions(tmp_path, QUESTIONS)
    assert load_questions(tmp_path) == QUESTIONS


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_a_question_may_hold_any_line_separator(tmp_path, separator):
    asked = [Question("docs/1#0", "docs", "text", ["docs/1"], f"which{separator}one", [f"a{separator}b"])]
    save_questions(tmp_path, asked)
    assert load_questions(tmp_path) == asked


def test_missing(tmp_path):
    with pytest.raises(ValueError, match=r"questions.jsonl is missing; the stage prepare"):
        load_questions(tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "a"}', "line 4: benchmark is missing, allowed: str"),
        ("not json", "line 4 is not valid JSON"),
        ("[" * 100_000, "line 4 is not valid JSON"),
        ("9" * 5_000, "line 4 is not valid JSON"),
        ("[]", r"line 4: \[\] is not allowed, allowed: a JSON object"),
        ("", "line 4 is not valid JSON"),
    ],
)
def test_broken_line_is_named(tmp_path, line, message):
    save_questions(tmp_path, QUESTIONS)
    path = tmp_path / "questions.jsonl"
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match=rf"questions\.jsonl {message}"):
        load_questions(tmp_path)


GONE = object()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("id", 5, "id: 5 is not allowed, allowed: str"),
        ("id", "", "id: '' is not allowed"),
        ("id", "docs/0#0", "id: 'docs/0#0' is that of line 1 as well"),
        ("benchmark", "nosuch", "benchmark: 'nosuch' is unknown, allowed: "),
        ("benchmark", ["docs"], r"benchmark: \['docs'\] is not allowed, allowed: str"),
        ("group", None, "group: None is not allowed, allowed: str"),
        ("question", None, "question: None is not allowed, allowed: str"),
        ("question", GONE, "question is missing, allowed: str"),
        ("question", "\ud800", r"question: '\\ud800' is not allowed, allowed: str"),
        ("images", "docs/1", r"images: 'docs/1' is not allowed, allowed: list\[str\]"),
        ("images", [None], r"images\[0\]: None is not allowed, allowed: str"),
        ("group", "general", "group: 'general' is not docs's, allowed: text"),
        ("group", "../x", r"group: '\.\./x' is not docs's, allowed: text"),
        ("answers", [], r"answers: \[\] is not allowed, allowed: one text or more"),
        ("answers", "7", r"answers: '7' is not allowed, allowed: list\[str\]"),
        ("answers", ["7", 7], r"answers\[1\]: 7 is not allowed, allowed: str"),
        ("choices", {"A": "one"}, "choices: .* is not allowed, allowed: list"),
        ("unit", None, "unit: None is not allowed"),
        ("unreadable", False, "unreadable: False is not allowed"),
        ("unreadable", GONE, "unreadable is missing"),
        ("more", 1, "'more' is an unknown key, allowed: id, benchmark"),
    ],
)
def test_a_question_that_is_none_is_named_by_line_and_key(tmp_path, key, value, message):
    save_questions(tmp_path, QUESTIONS)
    path = tmp_path / "questions.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[1].pop(key) if value is GONE else rows[1].update({key: value})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=rf"questions\.jsonl line 2: {message}") as caught:
        load_questions(tmp_path)
    assert "\n" not in str(caught.value) and str(caught.value).isprintable()


def test_a_question_that_no_reader_would_take_is_not_made():
    with pytest.raises(ValueError, match="answers"):
        Question("docs/1#0", "docs", "text", ["docs/1"], "which", [])
