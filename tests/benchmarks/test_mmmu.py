from types import SimpleNamespace

import pytest

from atr.benchmarks.mmmu import parse_choice, parse_open, score

CHOICES = ["a red fox", "the brown hare", "an owl", "a badger"]


@pytest.mark.parametrize(
    "answer, letter",
    [
        ("B", "B"),
        ("B.", "B"),
        ("(C)", "C"),
        ("The answer is (D).", "D"),
        ("The answer is D", "D"),
        ("C. an owl", "C"),
        ("(A) is wrong, (B) is right", "B"),  # of several, the last
        ("A or B or C", "C"),
        ("A. and then (B)", "B"),  # brackets go before everything
        ("I would say that it is the brown hare", "B"),  # of more than five words, the text of a choice
        ("not a red fox, rather I think an owl", "C"),
        ("It must be THE BROWN HARE in this case", "B"),
    ],
)
def test_the_letter_an_answer_gives(answer, letter):
    assert parse_choice(answer, CHOICES) == letter


def test_the_text_of_a_choice_counts_only_in_an_answer_of_more_than_five_words():
    turned = [CHOICES[turn:] + CHOICES[:turn] for turn in range(4)]
    assert [parse_choice("it would then be a badger", choices) for choices in turned] == ["D", "C", "B", "A"]
    # Of five it is a guess, wherever the choice stands.
    assert len({parse_choice("it would be a badger", choices) for choices in turned}) == 1


def test_an_answer_that_gives_none_is_the_same_guess_each_time():
    guesses = [parse_choice(f"no idea {n}", CHOICES) for n in range(400)]
    assert guesses == [parse_choice(f"no idea {n}", CHOICES) for n in range(400)]
    for letter in "ABCD":
        assert 60 < guesses.count(letter) < 140
    assert parse_choice("the brown hare", CHOICES) == parse_choice("the brown hare", CHOICES)


@pytest.mark.parametrize(
    "answer, meant",
    [
        ("8", {8.0}),
        ("1,234", {1234.0, 234.0}),  # the official patterns find its tail as well
        ("The answer is 42.", {42.0}),
        ("so x = 3.14159", {3.14}),
        ("x", {" x", "x "}),
        ("it is -7 degrees", {"-7 degrees", -7.0}),
        ("2e3 volts", {"2e3 volts", 2000.0, 3.0}),
        ("The sum is 5\nThus it is 12 cm", {5.0, "12 cm", 12.0}),
        ("Brown hare", {"brown hare"}),
        ("r = 3\ntotal", {"r = 3\ntotal", 3.0}),  # "=" counts in the last line alone: all of it is meant
        ("total\nr = 3", {3.0}),
    ],
)
def test_what_an_open_answer_means(answer, meant):
    assert parse_open(answer) == meant


@pytest.mark.parametrize(
    "answer, right, expected",
    [
        ("The result is 3.43", ["24/7", "3.429"], 1.0),
        ("24/7", ["24/7", "3.429"], 1.0),
        ("3.42", ["24/7", "3.429"], 0.0),
        ("it is Nitrogen gas", ["nitrogen"], 1.0),
        ("hydrogen", ["nitrogen"], 0.0),
        ("the point x", ["x"], 1.0),
        ("axis", ["x"], 0.0),  # one letter counts as a word only
        ("1000", ["1,000"], 1.0),
        ("", ["7"], 0.0),
    ],
)
def test_open_questions(answer, right, expected):
    assert score(answer, SimpleNamespace(answers=right, choices=[])) == expected


def test_multiple_choices():
    asked = SimpleNamespace(answers=["B"], choices=CHOICES)
    assert (score("(B)", asked), score("A", asked)) == (1.0, 0.0)
