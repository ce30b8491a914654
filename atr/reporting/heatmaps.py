"""Heat maps: differences by reducer and kept fraction, and overlap of reducers."""

from collections.abc import Mapping, Sequence
from statistics import fmean

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from atr.core.bootstrap import Floats
from atr.reporting.intrinsic import OverlapMatrix
from atr.reporting.paired import LOSS, TIE, WIN, Difference, PairedDifferences
from atr.reporting.style import INK, png, theme

CellTexts = dict[tuple[int, ...], str]
"""The text of each cell, by row and column."""

MARKS = {WIN: "▲", TIE: "=", LOSS: "▼"}
"""The mark of each outcome."""


def draw_differences(differences: PairedDifferences) -> bytes:
    """Points by which the best reducer leads each other one, by kept fraction; the strongest other is on top.

    A cell is coloured if its interval excludes zero, and has a mark of MARKS.
    """
    lines = {name: line for name, line in differences.others.items() if line}
    names = sorted(lines, key=lambda name: fmean(difference.mean for difference in lines[name].values()))
    keeps = differences.keeps
    points_OK, texts = _cells([lines[name] for name in names], keeps)
    limit = float(np.nanmax(np.abs(points_OK), initial=1.0))
    with theme():
        size = 1.9 + 0.56 * len(keeps), 1.1 + 0.25 * len(names)
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        _draw_matrix(axes, points_OK, texts, "PRGn", (-limit, limit))
        axes.set_xticks(range(len(keeps)), [f"{keep:g}" for keep in keeps])
        axes.set_yticks(range(len(names)), names)
        axes.set_xlabel("kept fraction of the visual tokens")
        axes.set_title(f"{differences.comparison.title}: {differences.best} minus …", loc="left")
        return png(figure)


def draw_overlap(overlap: OverlapMatrix) -> bytes:
    """IoU of the tokens that two reducers keep, in %, for every pair."""
    with theme():
        count = len(overlap.names)
        figure = Figure(figsize=(1.5 + 0.34 * count, 1.3 + 0.34 * count), layout="constrained")
        axes = figure.subplots()
        iou_OO = np.array(overlap.iou)
        texts = {place: f"{100 * value:.0f}" for place, value in np.ndenumerate(iou_OO)}
        _draw_matrix(axes, iou_OO, texts, "Greens", (0, 1))
        axes.set_xticks(range(count), overlap.names, rotation=90)
        axes.set_yticks(range(count), overlap.names)
        return png(figure)


def _cells(lines: Sequence[Mapping[float, Difference]], keeps: Sequence[float]) -> tuple[Floats, CellTexts]:
    """The value that colours each cell, in points and zero for a tie, and the text in each cell."""
    points_OK = np.full((len(lines), len(keeps)), np.nan)
    texts: CellTexts = {}
    for row, column in np.ndindex(points_OK.shape):
        if difference := lines[row].get(keeps[column]):
            texts[row, column] = f"{100 * difference.mean:+.1f} {MARKS[difference.outcome]}"
            points_OK[row, column] = 0 if difference.outcome == TIE else 100 * difference.mean
    return points_OK, texts


def _draw_matrix(
    axes: Axes, values: Floats, texts: CellTexts, colors: str, limits: tuple[float, float]
) -> None:
    """Draw cells coloured by value, with a text each; a cell of NaN stays empty."""
    low, high = limits
    axes.imshow(values, cmap=colors, vmin=low, vmax=high, aspect="auto")
    dark = max(abs(low), abs(high)) * 0.65
    for place, text in texts.items():
        color = "white" if abs(values[place]) > dark else INK
        axes.text(place[1], place[0], text, ha="center", va="center", fontsize=7, color=color)
    rows, columns = values.shape
    axes.vlines(np.arange(columns - 1) + 0.5, -0.5, rows - 0.5, color="white", linewidth=1)
    axes.hlines(np.arange(rows - 1) + 0.5, -0.5, columns - 0.5, color="white", linewidth=1)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
