"""JSON as dataclasses: what fits is taken as it is, what does not is one printable line."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from atr.core.typed_json import ListedFile, check_distinct, parse_record, read_records, short, value_of


@dataclass(frozen=True)
class Point:
    x: float
    name: str = ""


@dataclass(frozen=True)
class Shape:
    points: list[Point]
    grid: tuple[int, int]
    owner: str | None = None
    more: dict[str, Any] = field(default_factory=dict)


WHOLE = {"points": [{"x": 1}, {"x": 0.5, "name": "b"}], "grid": [2, 3], "owner": None, "more": {"a": [1]}}


def test_what_fits_is_taken_as_it_is():
    expected = Shape([Point(1), Point(0.5, "b")], (2, 3), None, {"a": [1]})
    assert parse_record(Shape, WHOLE, "file") == expected
    assert parse_record(Shape, WHOLE | {"unknown": 1}, "file") == expected
    assert parse_record(Shape, {"points": [], "grid": [2, 3]}, "file") == Shape([], (2, 3))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (5, "file: 5 is not allowed, allowed: a JSON object"),
        (WHOLE | {"points": [{"x": "1"}]}, "file: points[0]: x: '1' is not allowed, allowed: float"),
        (WHOLE | {"points": [{}]}, "file: points[0]: x is missing, allowed: float"),
        (
            WHOLE | {"points": {"x": 1}},
            "file: points: {'x': 1} is not allowed, allowed: list[Point]",
        ),
        (WHOLE | {"grid": [2]}, "file: grid: [2] is not allowed, allowed: tuple[int, int]"),
        (WHOLE | {"grid": [2, 3.0]}, "file: grid: 3.0 is not allowed, allowed: int"),
        (WHOLE | {"owner": 1}, "file: owner: 1 is not allowed, allowed: str | None"),
        (WHOLE | {"more": []}, "file: more: [] is not allowed, allowed: dict[str, Any]"),
    ],
)
def test_what_does_not_fit_is_named_by_its_place(content, message):
    with pytest.raises(ValueError) as caught:
        parse_record(Shape, content, "file")
    assert str(caught.value) == message


def test_an_exact_record_has_every_key_and_no_other():
    assert parse_record(Shape, WHOLE, "file", exact=True).grid == (2, 3)
    with pytest.raises(ValueError, match=r"^file: more is missing, allowed: "):
        parse_record(Shape, {key: WHOLE[key] for key in ("points", "grid", "owner")}, "file", exact=True)
    with pytest.raises(ValueError, match=r"^file: 'b' is an unknown key, allowed: points, grid, owner, more"):
        parse_record(Shape, WHOLE | {"b": 1, "c": 2}, "file", exact=True)


@pytest.mark.parametrize(
    ("hint", "value"),
    [
        (int, True),
        (int, 1.0),
        (float, True),
        (float, float("nan")),
        (float, -float("inf")),
        (str, b"bytes"),
        (str, "half a \ud83d pair"),
        (bool, 1),
        (float | None, "x"),
        (list[str], "text"),
        (Sequence[str], ["a", None]),
        (dict[str, int], {"a": "b"}),
    ],
)
def test_values_of_no_such_type(hint, value):
    with pytest.raises(ValueError, match=r"^here.* is not allowed, allowed: ") as caught:
        value_of(hint, value, "here")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("hint", "value"),
    [
        (int, 10**30),
        (float, 3),
        (float | None, None),
        (str, "\U0001f600 \u2028"),
        (bool, False),
        (Any, {"x": float("nan")}),
        (Sequence[str], ["a", "b"]),
    ],
)
def test_values_of_the_type(hint, value):
    assert value_of(hint, value, "here") is value or value_of(hint, value, "here") == value


def test_lines_are_told_apart_by_line_feeds_alone(tmp_path):
    path = tmp_path / "points.jsonl"
    path.write_bytes('{"x": 1, "name": "a\u2028b"}\n{"x": 2}\n'.encode())
    assert list(read_records(Point, path)) == [Point(1, "a\u2028b"), Point(2)]
    path.write_bytes(b'{"x": 1}\n{"x": 1, "name": "\xff"}\n')
    with pytest.raises(ValueError, match=r"points\.jsonl line 2 is not valid JSON"):
        list(read_records(Point, path))


def test_a_value_is_shown_on_one_line_of_bounded_length():
    assert short("a\n\ud800\x1b[31m") == r"'a\n\ud800\x1b[31m'"
    assert len(short("x" * 10_000)) == 80


@pytest.mark.parametrize(
    "name", ["..", ".", "", "a/b", "/a", "a\\b", "-a", ".hidden", "a\nb", "a\0", "\u00e9"]
)
def test_a_listed_file_lies_beside_its_manifest(name):
    assert ListedFile("shard-00000.safetensors", 1, "0" * 64).file
    with pytest.raises(ValueError, match=r"^file: .* is not allowed, allowed: a plain file name"):
        ListedFile(name, 1, "0" * 64)


def test_distinct_names():
    check_distinct("ids", ["a", "b"])
    with pytest.raises(ValueError, match=r"^ids: 'b' occurs twice, allowed: distinct names$"):
        check_distinct("ids", ["a", "b", "b"])
