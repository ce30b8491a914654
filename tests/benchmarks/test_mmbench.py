from types import SimpleNamespace

import pytest

from atr.benchmarks.mmbench import choice_in, letter_in, score

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
