from types import SimpleNamespace

import pytest

from atr.benchmarks.mmbench import choice_in, examples, letter_in, score

CHOICES = ["Apple", "pear", "plum pudding", "plum"]


@pytest.mark.parametrize(
    "answer, letter",
    [
        *(
            (text, "B")
            for text in ("B", "B.", "B,", "B:", "B)", "B).", "(B)", "(B).", ":B", ":B.", "it is B")
        ),
        *((text, None) for text in ("A B", "b", "BB", "", "B?", "F")),
        ("A dog runs there", None),  # the article, not the letter
        ("A dog runs", "A"),
        ("A dog runs, C) surely", "C"),
        ("E", "E"),
    ],
)
def test_the_only_letter_that_stands_alone(answer, letter):
    assert letter_in(answer) == letter


@pytest.mark.parametrize(
    "answer, letter",
    [
        ("an APPLE", "A"),
        ("a pear tree", "B"),
        ("apple or pear", None),
        ("plum pudding", None),
        ("a plum", "D"),
    ],
)
def test_the_only_choice_whose_text_is_there(answer, letter):
    assert choice_in(answer, CHOICES) == letter


@pytest.mark.parametrize(
    "answer, expected", [("B", 1.0), ("(A)", 0.0), ("the pear", 1.0), ("B apple", 1.0), ("no idea", 0.0)]
)
def test_the_letter_goes_before_the_text(answer, expected):
    assert score(answer, SimpleNamespace(answers=["B"], choices=CHOICES)) == expected


@pytest.mark.parametrize("empty", ["", "nan", None])
def test_a_choice_behind_an_empty_one_keeps_its_letter(empty):
    """As `create_options_prompt` of lmms-eval 0.3.5 shows it, and as the dataset's answer names it."""
    row = {"index": 7, "question": "How many?", "hint": "nan", "answer": "D", "image": None}
    [asked] = examples([row | {"A": "Two", "B": "One", "C": empty, "D": "Three"}])
    shown = asked.question.removeprefix("How many? There are several options:\n").split("\n\n")[0]
    assert shown == "A. Two\nB. One\nD. Three"
    assert [score(said, asked) for said in ("D", "three", "C", "two", "")] == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert choice_in("nothing", asked.choices) is None
