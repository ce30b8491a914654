import math
from types import SimpleNamespace

import pytest
from pydantic_core import PydanticCustomError

from atr.config.fields import are_distinct, check_fractions, check_names


@pytest.mark.parametrize(
    ("values", "distinct"), [([], False), ([1], True), ([1, 2], True), ([1, 2, 1], False), (["a", "b"], True)]
)
def test_values_are_distinct_if_there_is_one_and_none_occurs_twice(values, distinct):
    assert are_distinct(values) == distinct


@pytest.mark.parametrize("values", [[], [0.0], [1.01], [0.5, 0.5], [math.nan], [math.inf], [0.5, 0.50000001]])
def test_kept_fractions_that_figures_could_not_tell_apart_are_refused(values):
    with pytest.raises(PydanticCustomError, match="0 < kept <= 1"):
        check_fractions(values, SimpleNamespace(field_name="kept"))


def test_kept_fractions_may_reach_one():
    assert check_fractions([0.1, 1.0], SimpleNamespace(field_name="kept")) == [0.1, 1.0]


def test_names_are_known_and_occur_once():
    assert check_names(["b", "a"], ["a", "b", "c"], "own") == ["b", "a"]
    with pytest.raises(PydanticCustomError, match=r"^a, b, each once$"):
        check_names(["a", "a"], ["a", "b"], "own")
    with pytest.raises(PydanticCustomError, match=r"^a, b$"):
        check_names(["c"], ["a", "b"], "own")
    with pytest.raises(PydanticCustomError, match=r"^own: \[x/y\] for a file of your own$"):
        check_names(["x.y:Z"], ["a", "b"], "own")
