"""The scripts of benchmarks/ on sizes that take no time: what they print, not how fast."""

import json
import re
import runpy
from pathlib import Path

import pytest

from atr.datasets import micro

ROOT = Path(__file__).parents[1]


def printed(script, capsys, *arguments):
    runpy.run_path(str(ROOT / "benchmarks" / f"{script}.py"))["main"](list(arguments))
    return capsys.readouterr().out.splitlines()


def test_selection_prints_a_row_for_every_reducer_and_budget(capsys):
    from atr.reduction import REDUCERS

    small = ("--sides", "2", "4", "--width", "64", "--keep", "0.25", "0.5", "--seconds", "0.001")
    device, header, *lines = printed("selection", capsys, *small, "--batch", "2", "--device", "cpu")
    assert "width 64, batch 2" in device and header.split()[:3] == ["reducer", "N", "K"]
    rows = [line.split() for line in lines]
    names = set(REDUCERS) - {"full", "none"}
    assert {tuple(row[:3]) for row in rows} == {
        (name, str(tokens), str(tokens * part // 4))
        for name in names
        for tokens in (4, 16)
        for part in (1, 2)
    }
    assert all(float(row[4]) == 1 for row in rows if row[0] == "selector")
    assert all(float(time) >= 0 for row in rows for time in row[3:])


@pytest.mark.slow
def test_pipeline_prints_each_ratio_with_its_two_times(capsys):
    small = ("--images", "8", "--steps", "8", "--keep", "0.5", "--batch", "2", "--seconds", "0.001")
    _, *lines = [line for line in printed("pipeline", capsys, *small, "--device", "cpu") if line]
    rows = [match for line in lines if (match := re.match(r"(.+?) +([\d.]+) ms / +([\d.]+) ms = (.+)", line))]
    assert [row[1] for row in rows] == [
        "store over a plain file", "step over a bare loop's", "generate from 0.5 over all",
    ]  # fmt: skip
    for row in rows:
        assert float(row[4]) == pytest.approx(float(row[2]) / float(row[3]), rel=0.05)


def test_charts_tells_a_wrong_bar_from_a_wrong_reading(tmp_path, capsys):
    drawn = micro.sample("charts", "evaluate", 3, seed=5)
    (label, value), (_, other), *_ = drawn.turns
    row = {"benchmark": "charts", "image": "charts/000003", "question": label}
    rows = [
        row | {"prediction": value, "score": 1.0},
        *[row | {"prediction": other, "score": 0.0}] * 2,
        *[row | {"prediction": f"{value}{other}", "score": 0.0}] * 3,
        {"benchmark": "docs", "image": "docs/000003", "question": "name", "prediction": other, "score": 0.0},
    ]
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [line.split(maxsplit=1) for line in printed("charts", capsys, str(path), "--seed", "5")]
    assert lines == [["3", "something else"], ["2", "the value of another bar"], ["1", "right"]]
