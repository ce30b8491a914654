from typing import Annotated, Literal

import pytest
from pydantic import Field

from atr.config.errors import abridge, choices, describe_type, failure


def test_a_value_is_shown_on_one_line_of_bounded_length():
    assert abridge("a\nb") == r"'a\nb'"
    assert len(abridge("x" * 1000)) == 80


def test_an_error_names_key_value_and_what_is_allowed():
    assert str(failure("a.b", 3, "is odd", "2, 4")) == "a.b: 3 is odd, allowed: 2, 4"


@pytest.mark.parametrize(
    ("hint", "text"),
    [
        (int, "int"),
        (int | None, "int | None"),
        (list[float], "list[float]"),
        (list[Annotated[float, Field(ge=0)]], "list[float]"),
        (Annotated[int | None, Field(ge=0)], "int | None"),
        (Literal["a", 16], "a, 16"),
    ],
)
def test_types_are_described_as_a_user_would_write_them(hint, text):
    assert describe_type(hint) == text


def test_the_choices_of_a_field_are_those_of_its_literal():
    assert choices(Annotated[Literal["a", "b"], Field()]) == ("a", "b")
    assert choices(str) == ()
