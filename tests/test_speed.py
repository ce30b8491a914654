"""The scripts of benchmarks/ on sizes that take no time: what they print, not how fast."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def printed(script, capsys, *arguments):
    runpy.run_path(str(ROOT / "benchmarks" / f"{script}.py"))["main"](list(arguments))
    return capsys.readouterr().out.splitlines()


def test_selection_prints_a_row_for_every_reducer_and_budget(capsys):
    from atr.reduction.registry import built_in_names

    small = ("--sides", "2", "4", "--width", "64", "--keep", "0.25", "0.5", "--seconds", "0.001")
    device, header, *lines = printed("selection", capsys, *small, "--batch", "2", "--device", "cpu")
    assert "width 64, batch 2" in device and header.split()[:3] == ["reducer", "N", "K"]
    rows = [line.split() for line in lines]
    names = set(built_in_names()) - {"full", "none", "fastv", "pyramiddrop"}
    assert {tuple(row[:3]) for row in rows} == {
        (name, str(tokens), str(tokens * part // 4))
        for name in names
        for tokens in (4, 16)
        for part in (1, 2)
    }
    assert all(float(row[4]) == 1 for row in rows if row[0] == "selector")
    assert all(float(time) >= 0 for row in rows for time in row[3:])


def test_seeds_prints_the_widths_by_number_of_seeds(capsys, tmp_path):
    synthetic = runpy.run_path(str(ROOT / "tests/reporting/synthetic.py"))
    synthetic["write"](tmp_path, questions=40, reducers=("full", "random", "selector", "l2_norm"))
    header, *lines = printed("seeds", capsys, "--experiments", str(tmp_path), "--best", "l2_norm")
    assert header.split()[2:] == [*map(str, synthetic["KEEPS"]), "widest"]
    rows = [re.split(r" {2,}", line) for line in lines if line.startswith("docs")]
    assert [row[1] for row in rows] == [
        "selector", "l2_norm",
        *(f"random, {seeds} seed(s)" for seeds in (1, 2, 3)),
        *(f"l2_norm - random, {seeds} seed(s)" for seeds in (1, 2, 3)),
    ]  # fmt: skip
    widths = {row[1]: [float(number) for number in row[2:]] for row in rows}
    assert all(max(values[:-1]) == values[-1] > 0 for values in widths.values())
    assert sum(widths["random, 3 seed(s)"]) < sum(widths["random, 1 seed(s)"])


@pytest.mark.slow
def test_pipeline_prints_each_ratio_with_its_two_times(capsys):
    small = ("--images", "8", "--steps", "8", "--keep", "0.5", "--batch", "2", "--seconds", "0.001")
    _, *lines = [line for line in printed("pipeline", capsys, *small, "--device", "cpu") if line]
    rows = [match for line in lines if (match := re.match(r"(.+?) +([\d.]+) ms / +([\d.]+) ms = (.+)", line))]
    assert [row[1] for row in rows] == [
        "store / plain file", "step / plain loop", "generate from 0.5 / from all",
    ]  # fmt: skip
    for row in rows:
        assert float(row[4]) == pytest.approx(float(row[2]) / float(row[3]), rel=0.05)
