"""The figures of the paper, as PNG: its curves, its Figure 1 (kept patches) and its Figure 8 (answers)."""

import io
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from atr.reporting.cases import LINES, Case
from atr.reporting.results import Comparison, Masks, Score

ImageOf = Callable[[str], Image.Image]
"""Looks an image up by its id."""


@dataclass(frozen=True)
class Style:
    """How the line of a reducer looks in every plot."""

    label: str
    color: str
    line: Any = "-"
    marker: str = ""


STYLES = {
    "selector": Style("selector", "#b2182b", marker="o"),
    "random": Style("random", "#2166ac", marker="s"),
    "full": Style("all tokens", "#1a1a1a", line=(0, (5, 2))),
    "none": Style("no image", "#8c8c8c", line=(0, (2, 2))),
}
PEERS = (("#1b7837", "^"), ("#762a83", "D"), ("#e08214", "v"), ("#35978f", "P"), ("#c51b7d", "X"))
"""Colours and markers of the other reducers, by turns."""

_INK, _RULE, _RIGHT, _WRONG = "#222222", "#d9d9d9", "#1b7837", "#b2182b"
_DROPPED = (0.62, 0.64, 0.66, 1.0)
_LOOK: Any = {
    "figure.dpi": 200,
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": _INK,
    "text.parse_math": False,  # a dollar sign in an answer is a dollar sign
    "axes.edgecolor": "#777777",
    "axes.labelcolor": _INK,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.handlelength": 2.6,
}


def curves(comparisons: Sequence[Comparison]) -> bytes:
    """Score against kept fraction, one panel for each comparison, one legend for all."""
    with _look():
        figure = Figure(figsize=(4.4 * len(comparisons), 3.5), layout="constrained")
        panels = figure.subplots(1, len(comparisons), squeeze=False)[0]
        for axes, comparison in zip(panels, comparisons, strict=True):
            _curves(axes, comparison)
        handles, labels = panels[0].get_legend_handles_labels()
        columns = len(labels) if len(labels) <= 4 else 3 * len(comparisons)
        figure.legend(handles, labels, loc="outside lower center", ncols=columns)
        return _png(figure)


def pages(images: Sequence[str], image: ImageOf, masks: dict[str, Masks]) -> bytes:
    """A row per image: as it is, and as each reducer leaves it, dropped patches grey (Figure 1)."""
    with _look():
        figure = Figure(figsize=(1.9 * (1 + len(masks)), 1.9 * len(images) + 0.35), layout="constrained")
        grid = figure.subplots(len(images), 1 + len(masks), squeeze=False)
        for line, name in zip(grid, images, strict=True):
            picture = image(name)
            _patches(line[0], picture, next(iter(masks.values())).grid, kept=None)
            line[0].set_ylabel(name, fontsize=7.5)
            for axes, mask in zip(line[1:], masks.values(), strict=True):
                _patches(axes, picture, mask.grid, mask.kept[name])
        for axes, title in zip(grid[0], ["image", *map(_column, masks.items())], strict=True):
            axes.set_title(title, fontsize=9)
        return _png(figure)


def examples(cases: Sequence[Case], image: ImageOf, columns: int = 3) -> bytes:
    """Images with their question and the answers of every line, right ones marked (Figure 8)."""
    with _look():
        rows = -(-len(cases) // columns)
        figure = Figure(figsize=(2.5 * columns, 3.65 * rows), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False).flat
        for axes in grid:
            axes.set_axis_off()
        for axes, case in zip(figure.axes, cases, strict=False):
            _example(axes, case, image(case.row.image))
        return _png(figure, bbox_inches="tight", pad_inches=0.05)


def style(reducer: str, peer: int) -> Style:
    """The fixed style of the paper's lines, or that of the n-th peer."""
    color, marker = PEERS[peer % len(PEERS)]
    return STYLES.get(reducer, Style(reducer, color, marker=marker))


@contextmanager
def _look() -> Iterator[None]:
    """Our style over matplotlib's defaults, not over a user's matplotlibrc: equal data give equal bytes."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_LOOK)
        yield


def _png(figure: Figure, **crop: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None}, **crop)
    return buffer.getvalue()


def _curves(axes: Axes, comparison: Comparison) -> None:
    peers = [name for name in comparison.curves if name not in STYLES]
    for name, curve in comparison.curves.items():
        look = style(name, peers.index(name) if name in peers else 0)
        # Keeping every token is `full` for every reducer, so each curve ends there.
        _curve(axes, (*(score for score in curve if score.keep < 1), comparison.full), look)
    for look, level in ((STYLES["full"], comparison.full), (STYLES["none"], comparison.none)):
        drawn: dict[str, Any] = {"color": look.color, "linestyle": look.line, "label": look.label}
        axes.axhline(100 * level.mean, linewidth=1.2, zorder=1, **drawn)
    axes.set_title(comparison.title)
    axes.set_xlabel("kept fraction of the visual tokens")
    axes.set_ylabel("score, %")
    axes.set_xticks(np.arange(1, 11) / 10)
    axes.set_xlim(0.05, 1.03)
    axes.grid(axis="y", color=_RULE, linewidth=0.6)
    axes.set_axisbelow(True)


def _curve(axes: Axes, curve: Sequence[Score], look: Style) -> None:
    keep, mean, low, high = np.array([[score.keep, score.mean, score.low, score.high] for score in curve]).T
    axes.fill_between(keep, 100 * low, 100 * high, color=look.color, alpha=0.15, linewidth=0, zorder=2)
    drawn: dict[str, Any] = {"color": look.color, "linestyle": look.line, "label": look.label}
    above = 4 if look is STYLES["selector"] else 3
    axes.plot(keep, 100 * mean, linewidth=1.6, marker=look.marker, markersize=3.6, zorder=above, **drawn)


def _column(item: tuple[str, Masks]) -> str:
    reducer, masks = item
    return f"{reducer}, {masks.keep:.0%}".replace("%", " %")


def _patches(axes: Axes, picture: Image.Image, grid: tuple[int, int], kept: Sequence[int] | None) -> None:
    """Draw an image; where patches are dropped, grey them and draw the grid."""
    width, height = picture.size
    extent = (0, width, height, 0)
    axes.imshow(picture, extent=extent, interpolation="nearest")
    if kept is not None:
        axes.imshow(_veil(grid, kept), extent=extent, interpolation="nearest")
        axes.vlines(np.linspace(0, width, grid[1] + 1), 0, height, color="white", linewidth=0.3)
        axes.hlines(np.linspace(0, height, grid[0] + 1), 0, width, color="white", linewidth=0.3)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(visible=True, color="#999999", linewidth=0.5)


def _veil(grid: tuple[int, int], kept: Sequence[int]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """RGBA of each patch: opaque grey where it is dropped, clear where it is kept."""
    veil = np.tile(_DROPPED, (grid[0] * grid[1], 1))
    veil[list(kept)] = 0
    return veil.reshape(*grid, 4)


def _example(axes: Axes, case: Case, picture: Image.Image) -> None:
    """An image with the question over it and the answers under it."""
    axes.set_axis_on()
    _patches(axes, picture, (1, 1), kept=None)
    axes.set_title(_wrapped(f"{case.row.benchmark}: {case.row.question}", 34, 2), fontsize=8, loc="left")
    for line, name in enumerate(LINES):
        row = case.answers[name]
        color, mark = (_RIGHT, "✓") if row.right else (_WRONG, "✗")
        height = -0.04 - 0.09 * line
        place: dict[str, Any] = {"transform": axes.transAxes, "va": "top", "fontsize": 8}
        axes.text(0, height, STYLES[name].label, **place)
        axes.text(0.33, height, mark, color=color, **place)
        axes.text(0.41, height, _wrapped(row.prediction or "(no answer)", 22, 1), color=color, **place)


def _wrapped(text: str, width: int, lines: int) -> str:
    return "\n".join(textwrap.wrap(text, width, max_lines=lines, placeholder=" …"))
