import doctest

import numpy as np
import pytest

from atr.benchmarks import base
from atr.benchmarks.base import Benchmark, HubDataset
from atr.core.records import Example, Question

EXAMPLE = Example("1", "what?", ["it"], [])
QUESTION = Question("mine/1", "mine", "text", [], "what?", ["it"])


def make(examples=lambda rows: rows, score=lambda prediction, question: 1.0):
    return Benchmark("mine", "text", HubDataset("org/name", "*.parquet"), examples, score)


def test_examples_are_those_of_the_file():
    assert list(make().examples([EXAMPLE, EXAMPLE])) == [EXAMPLE, EXAMPLE]


@pytest.mark.parametrize(
    "wrong",
    ["text", None, Example(1, "what?", ["it"], []), Example("1", "what?", ["it"], [], unit=None),
     Example("1", "what?", ["it"], None)],
)  # fmt: skip
def test_what_is_no_example_is_named(wrong):
    with pytest.raises(
        ValueError, match=r"^mine: examples\(\) gave .*, allowed: an Example with texts as id"
    ):
        list(make().examples([EXAMPLE, wrong]))


def test_an_error_of_the_files_functions_is_one_line():
    with pytest.raises(ValueError, match=r"^mine: examples\(\) raised KeyError: 'text'$"):
        list(make(lambda rows: (row["text"] for row in rows)).examples([{}]))
    with pytest.raises(
        ValueError, match=r"^mine: score\(\) of 'seven' raised ZeroDivisionError: division by ze"
    ):
        make(score=lambda prediction, question: 1 / 0).score("seven", QUESTION)


def test_an_error_of_the_reader_is_left_as_it_is():
    def rows():
        raise ValueError("a.parquet row 3: text is null")
        yield

    with pytest.raises(ValueError, match=r"^a\.parquet row 3"):
        list(make().examples(rows()))


@pytest.mark.parametrize("score", [0, 1, True, 0.25, np.float32(0.5)])
def test_a_score_is_a_number_of_any_type(score):
    assert make(score=lambda *_: score).score("a", QUESTION) == float(score)


@pytest.mark.parametrize("score", [float("nan"), -0.1, 1.001, None, "1", float("inf"), [1.0]])
def test_any_other_score_is_refused(score):
    with pytest.raises(ValueError, match=r"^mine: score\(\) of 'a' is .*, allowed: a number in 0\.\.1$"):
        make(score=lambda *_: score).score("a", QUESTION)


def test_the_examples_in_the_docstrings_hold():
    assert doctest.testmod(base).attempted == 1 and doctest.testmod(base).failed == 0
