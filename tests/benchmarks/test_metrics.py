import doctest

import pytest
from anls import anls_score
from hypothesis import assume, example, given
from hypothesis import strategies as st

from atr.benchmarks import metrics
from atr.benchmarks.metrics import (
    anls,
    exact_match,
    exact_words,
    relaxed_accuracy,
)

# Few letters, so that random strings come close to each other; spaces, capitals and what is not ASCII.
TEXT = st.text("abAB É\t", max_size=8)
ANSWERS = st.lists(TEXT, min_size=1, max_size=3)


@given(TEXT, ANSWERS)
@example("", [""])
@example("ab", ["abcd"])  # exactly the threshold
@example("İ", ["i"])  # lower case is longer than upper case
def test_anls_is_that_of_the_anls_package(prediction, answers):
    assert anls(prediction, answers) == pytest.approx(anls_score(prediction, answers), abs=1e-12)


def lmms_eval_anls(prediction, answers):
    """As lmms-eval 0.3.5 and 0.7.3 compute it, with edits of the package `anls`."""
    values = []
    for answer in answers:
        truth, said = (" ".join(text.strip().lower().split()) for text in (answer, prediction))
        length = max(len(answer.upper()), len(prediction.upper()))
        edits = round((1 - anls_score(said, [truth], threshold=2)) * max(len(truth), len(said)))
        values.append(edits / length if length else 0.0)
    similarity = 1 - min(values)
    return similarity if similarity >= 0.5 else 0.0


@given(TEXT, ANSWERS)
@example("ab  iglo", ["ab igloo"])
@example("ab", ["abcd"])
def test_anls_differs_from_lmms_evals_at_one_half_and_in_blanks_alone(prediction, answers):
    theirs, texts = lmms_eval_anls(prediction, answers), [prediction, *answers]
    assert anls(prediction, answers) <= theirs + 1e-12
    if all(text == " ".join(text.split()) for text in texts) and theirs != 0.5:
        assert anls(prediction, answers) == pytest.approx(theirs, abs=1e-12)


@given(TEXT, ANSWERS, st.sampled_from([0.2, 0.5, 0.7, 1.0]))
def test_anls_has_the_packages_threshold(prediction, answers, threshold):
    assert anls(prediction, answers, threshold) == pytest.approx(
        anls_score(prediction, answers, threshold), abs=1e-12
    )


@given(TEXT, ANSWERS)
def test_exact_match_is_an_anls_of_one(prediction, answers):
    assert exact_match(prediction, answers) == float(anls_score(prediction, answers) == 1)


@pytest.mark.parametrize(
    "prediction, answers, expected",
    [
        # Within 5 % of the gold answer (Masry et al., 2022), on either side and not beyond.
        ("100", ["100"], 1.0),
        ("95", ["100"], 1.0),
        ("105.0", ["100"], 1.0),
        ("94.9", ["100"], 0.0),
        ("105.1", ["100"], 0.0),
        ("-97", ["-100"], 1.0),
        ("97", ["-100"], 0.0),
        ("1900", ["2000"], 1.0),
        # A percentage is a hundredth, on both sides.
        ("12%", ["0.12"], 1.0),
        ("12", ["12%"], 0.0),
        ("12.5%", ["12%"], 1.0),
        # No tolerance about zero, nor in words.
        ("0", ["0"], 1.0),
        ("0.0", ["0"], 0.0),
        ("0.001", ["0"], 0.0),
        ("Peru", ["peru "], 1.0),
        ("Perú", ["Peru"], 0.0),
        ("about 100", ["100"], 0.0),
        ("nan", ["100"], 0.0),
        ("8", ["7", "8"], 1.0),
    ],
)
def test_relaxed_accuracy_by_hand(prediction, answers, expected):
    assert relaxed_accuracy(prediction, answers) == expected


@given(st.floats(1, 1e6), st.floats(0.5, 1.5))
@example(7.0, 0.95)
def test_relaxed_accuracy_is_torchmetrics_relative_error(right, ratio):
    from torch import float64, tensor
    from torchmetrics.functional import mean_absolute_percentage_error

    said = right * ratio
    error = mean_absolute_percentage_error(
        tensor([said], dtype=float64), tensor([right], dtype=float64)
    ).item()
    assume(abs(error - 0.05) > 1e-9)
    assert relaxed_accuracy(repr(said), [repr(right)]) == float(error < 0.05)


@pytest.mark.parametrize(
    "prediction, answers, expected",
    [
        ("T-Shirt.", ["tshirt"], 1.0),
        ("  Yes! ", ["yes"], 1.0),
        ("yes sir", ["yes"], 0.0),
        ("(A)", ["a"], 1.0),
        ("éa", ["ea"], 0.0),
    ],
)
def test_exact_words_by_hand(prediction, answers, expected):
    assert exact_words(prediction, answers) == expected


def test_what_cannot_be_scored_is_refused():
    for function in (anls, exact_match, exact_words, relaxed_accuracy):
        with pytest.raises(ValueError, match="one or more strings"):
            function("a", [])
        with pytest.raises(ValueError, match="one or more strings"):
            function("a", "answer")


def test_the_examples_in_the_docstrings_hold():
    assert doctest.testmod(metrics).attempted == 7
    assert doctest.testmod(metrics).failed == 0
