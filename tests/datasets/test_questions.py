import pytest

from atr.datasets.questions import Question, load_questions, save_questions

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


@pytest.mark.parametrize("line", ['{"id": "a"}', "not json", "[]", ""])
def test_broken_line_is_named(tmp_path, line):
    save_questions(tmp_path, QUESTIONS)
    path = tmp_path / "questions.jsonl"
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match=r"questions.jsonl line 4 is"):
        load_questions(tmp_path)
