import doctest

import pytest

from atr.benchmarks import vqa
from atr.benchmarks.vqa import normalise_vqa, vqa_accuracy


@pytest.mark.parametrize(
    "text, normalised",
    [
        ("The Answer", "answer"),
        ("an apple a day", "apple day"),
        ("theatre", "theatre"),
        ("two", "2"),
        ("None", "0"),
        ("twenty ten", "twenty 10"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("yall'd've", "y'all'd've"),
        ("oclock", "o'clock"),
        ("wont", "won't"),
        ("well", "well"),  # not we'll
        ("shell", "shell"),
        ("3,000", "3000"),
        ("1, 2", "1 2"),
        ("really?", "really"),
        ("john's", "john 's"),
        ("stop!", "stop"),  # at the end nothing touches a blank, so it becomes one, which goes
        ("stop! now", "stop now"),
        ("left/right", "left right"),
        ("t-shirt", "t shirt"),
        ("a t-shirt - red", "tshirt red"),  # the mark touches a blank somewhere, so all of them go
        ("St. Ives", "st ives"),
        ("1.5", "1.5"),
        ("5.", "5"),
        ("www.shop.com", "wwwshopcom"),
        ("$5", "$5"),
        ("10:30", "10:30"),
        (" two\nlines\tapart ", "2 lines apart"),
        ("", ""),
        ("?", ""),
    ],
)
def test_normalisation_by_hand(text, normalised):
    assert normalise_vqa(text) == normalised


@pytest.mark.parametrize("matching, accuracy", [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_accuracy_of_an_answer_that_so_many_of_ten_annotators_gave(matching, accuracy):
    """Leaving each annotator out in turn: k of the ten see k - 1 others, the rest see k, of three needed."""
    answers = ["Nokia"] * matching + [f"other {n}" for n in range(10 - matching)]
    assert vqa_accuracy("the nokia", answers) == pytest.approx(accuracy)


def test_annotators_are_normalised_too():
    assert (
        vqa_accuracy("2 t shirts", ["two t-shirts", "Two T-shirts!", "the two t-shirts", "2 t shirts"]) == 1
    )
    assert vqa_accuracy("", ["?", "the", "unanswerable"]) == pytest.approx((1 / 3 + 1 / 3 + 2 / 3) / 3)


def test_no_answers_are_refused():
    with pytest.raises(ValueError, match="one or more strings"):
        vqa_accuracy("a", [])


def test_the_examples_in_the_docstrings_hold():
    assert doctest.testmod(vqa).attempted == 2 and doctest.testmod(vqa).failed == 0
