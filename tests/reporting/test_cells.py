import json
from dataclasses import dataclass
from typing import Any

import pytest

from atr.reporting.cells import (
    Provenance,
    check_agreement,
    conditions_of,
    flatten,
    part_name,
    read_cells,
    read_object,
)


@dataclass(frozen=True)
class Cell:
    """A cell with one value of its own."""

    reducer: str
    value: float
    left_out: str
    parameters: dict[str, Any]
    provenance: Provenance
    resolved: dict[str, Any]


CONTENT = {
    "value": 1.5,
    "left_out": "",
    "parameters": {},
    "provenance": {"commit": None, "versions": {"torch": "2"}},
    "resolved": {},
}


@pytest.fixture
def write(tmp_path):
    """Writes the cell of a reducer with some other values, and returns its path."""

    def written(folder, **values):
        path = tmp_path / folder / "metrics.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(CONTENT | {"reducer": folder} | values))
        return path

    return written


def test_cells_are_in_the_order_of_the_reducers_and_missing_ones_are_left_out(tmp_path, write):
    for reducer in ("random", "selector", "stale", "my_package/my_module"):
        write(reducer)
    names = ["selector", "dart", "random", "my_package/my_module"]
    cells = read_cells(Cell, tmp_path, "intrinsic", names)
    assert list(cells) == ["selector", "random", "my_package/my_module"]
    assert cells["random"].provenance == Provenance(None, {"torch": "2"})
    assert read_cells(Cell, tmp_path / "nowhere", "intrinsic", names) == {}


def test_a_reducer_that_was_left_out_has_no_cell_whatever_else_its_file_holds(tmp_path, write):
    write("full", left_out="takes no budget", value=None)
    assert read_cells(Cell, tmp_path, "intrinsic", ["full"]) == {}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"value": "1"}, "value: '1' is not allowed, allowed: float"),
        ({"value": float("nan")}, "value: nan is not allowed"),
        ({"other": 1}, "'other' is an unknown key"),
        ({"left_out": None}, "left_out: None is not allowed"),
        ({"provenance": {"commit": None}}, "provenance: versions is missing"),
        ({"reducer": "../random"}, "reducer: '../random' is not allowed, allowed: selector"),
    ],
)
def test_a_wrong_cell_is_named_with_its_stage(tmp_path, write, values, message):
    path = write("selector", **values)
    with pytest.raises(
        ValueError, match=rf"{path}: {message}.*; stage latency \(reducer selector\) writes it"
    ):
        read_cells(Cell, tmp_path, "latency", ["selector"])


@pytest.mark.parametrize("text", ["[1]", "{", ""])
def test_a_file_without_an_object_is_named_with_its_stage(tmp_path, text):
    path = tmp_path / "metrics.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"{path}.*; stage pretrain writes it"):
        read_object(path, "pretrain")


def test_files_that_differ_in_a_condition_are_named_with_its_values(tmp_path):
    one, two, three = (tmp_path / name for name in "abc")
    check_agreement({}, "intrinsic")
    check_agreement({one: {"keep": [0.3]}, two: {"keep": [0.3]}}, "intrinsic")
    message = rf"{three}: keep: \[0.5\] is not allowed, allowed: \[0.3\], as in {one}; run stage intrinsic"
    with pytest.raises(ValueError, match=message):
        check_agreement({one: {"keep": [0.3]}, two: {"keep": [0.3]}, three: {"keep": [0.5]}}, "intrinsic")
    with pytest.raises(ValueError, match=f"{two}: seed: 1 is not allowed, allowed: None"):
        check_agreement({one: {}, two: {"seed": 1}}, "intrinsic")


def test_conditions_are_all_parameters_but_machine_trainer_and_names_of_reducers():
    parameters = {
        "seed": 0,
        "evaluate": {"keep": [0.3], "reducers": ["full"], "own": []},
        "trainer": {"precision": "auto"},
    }
    resolved = {"precision": "32-true", "device": "cpu", "processor": "x", "features": {"device": "cuda"}}
    cell = Cell("random", 1.0, "", parameters, Provenance(None, {}), resolved)
    assert conditions_of(cell) == {
        "seed": 0,
        "evaluate.keep": [0.3],
        "resolved.precision": "32-true",
        "resolved.features.device": "cuda",
    }


def test_nested_keys_are_joined():
    nested = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    assert flatten(nested) == {"a.b": 1, "a.c.d": 2, "e": 3}
    assert flatten(nested, "x/", "/") == {"x/a/b": 1, "x/a/c/d": 2, "x/e": 3}


@pytest.mark.parametrize("name", ["docvqa", "my-bench_2", "my_package/my_benchmark", "A" * 64])
def test_names_of_benchmarks_are_files_or_paths_of_files(name):
    assert part_name(name) == name


@pytest.mark.parametrize(
    "name",
    ["", "../a", "/a", "a/", "a//b", "a/../b", ".a", "a.b", "a@b", "a b", "a\x00", "a\n", "é", "a" * 65],
)
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match="is no name, allowed: at most 64 letters"):
        part_name(name)
