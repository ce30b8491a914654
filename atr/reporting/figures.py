"""The figures of the paper, as PNG: its curves, its Figure 1 (kept patches) and its Figure 8 (answers)."""

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from atr.reporting.examples import LINES, Case
from atr.reporting.results import ADAPTIVE, Comparison, Masks, Score
from atr.reporting.style import INK, RULE, drawable, png, theme

ImageOf = Callable[[str], Image.Image]
"""Looks an image up by its id."""


@dataclass(frozen=True)
class Style:
    """How the line of a reducer looks in every plot; a muted one is thin and has no band."""

    label: str
    color: str
    line: Any = "-"
    marker: str = ""
    muted: bool = False


STYLES = {
    "selector": Style("selector", "#b2182b", marker="o"),
    "random": Style("random", "#2166ac", marker="s"),
    "full": Style("all tokens", "#1a1a1a", line=(0, (5, 2))),
    "none": Style("no image", "#8c8c8c", line=(0, (2, 2))),
}
BEST = "#e6550d"
"""Colour of the reducer that is compared with the others, where it is not the selector itself."""
PEERS = tuple(
    (color, line, marker)
    for line, (color, marker) in product(
        ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (5, 1.2, 1, 1.2)), (0, (9, 2))),
        zip(
            ("#44aa99", "#aa4499", "#999933", "#332288", "#dda833", "#117733", "#66b5dd"),
            ("^", "D", "v", "P", "X", "<", ">"),
            strict=True,
        ),
    )
)
"""Muted colours, lines and markers of the other reducers, more than there are of these."""
_RIGHT, _WRONG = "#1b7837", "#b2182b"
_DROPPED = (0.62, 0.64, 0.66, 1.0)


def curves(comparisons: Sequence[Comparison], best: str = "selector") -> bytes:
    """Score against kept fraction, one panel for each comparison, one legend for all.

    A star is an adaptive count at its mean kept fraction, in the colour of its sibling with a fixed one. The
    legend is under the panels, or beside them, from the highest line down, where it is long.
    """
    with theme():
        labels = _legend(comparisons)
        long = len(labels) > 6
        width, height = 4.4 * len(comparisons) + 1.6 * long, max(3.5, 0.3 + 0.17 * len(labels) * long)
        figure = Figure(figsize=(width, height), layout="constrained")
        panels = figure.subplots(1, len(comparisons), squeeze=False)[0]
        for axes, comparison in zip(panels, comparisons, strict=True):
            drawn = _curves(axes, comparison, best)
        columns = 1 if long else len(labels) if len(labels) <= 4 else 3
        handles, texts = [drawn[name] for name in labels], [_label(name) for name in labels]
        place: Any = "outside right upper" if long else "outside lower center"
        figure.legend(handles, texts, loc=place, ncols=columns)
        return png(figure)


def pages(images: Sequence[str], image: ImageOf, masks: dict[str, Masks]) -> bytes:
    """A row per image: as it is, and as each reducer leaves it, dropped patches grey (Figure 1)."""
    with theme():
        figure = Figure(figsize=(1.9 * (1 + len(masks)), 1.9 * len(images) + 0.35), layout="constrained")
        grid = figure.subplots(len(images), 1 + len(masks), squeeze=False)
        for line, name in zip(grid, images, strict=True):
            picture = image(name)
            _patches(line[0], picture, next(iter(masks.values())).grid, kept=None)
            line[0].set_ylabel(drawable(name)[:40], fontsize=7.5)
            for axes, mask in zip(line[1:], masks.values(), strict=True):
                _patches(axes, picture, mask.grid, mask.kept[name])
        for axes, title in zip(grid[0], ["image", *map(_column, masks.items())], strict=True):
            axes.set_title(title, fontsize=9)
        return png(figure)


def examples(cases: Sequence[Case], image: ImageOf, columns: int = 3) -> bytes:
    """Images with their question and the answers of every line, right ones marked (Figure 8)."""
    with theme():
        rows = -(-len(cases) // columns)
        figure = Figure(figsize=(2.5 * columns, 3.65 * rows), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False).flat
        for axes in grid:
            axes.set_axis_off()
        for axes, case in zip(figure.axes, cases, strict=False):
            _example(axes, case, image(case.row.image))
        return png(figure, bbox_inches="tight", pad_inches=0.05)


def styles(reducers: Sequence[str], best: str) -> dict[str, Style]:
    """The fixed styles of the paper's lines, that of the best reducer, and one of PEERS for each other."""
    fixed = {best: Style(best, BEST, marker="o")} | STYLES
    peers = [name for name in reducers if name not in fixed]
    looks = (PEERS[number % len(PEERS)] for number in range(len(peers)))
    return fixed | {name: Style(name, *look, muted=True) for name, look in zip(peers, looks, strict=True)}


def _legend(comparisons: Sequence[Comparison]) -> list[str]:
    """The names of all that is drawn, by their mean level, where there are many, else in the usual order."""
    first = comparisons[0]
    names = [*first.curves, *first.adaptive, *_levels(first)]

    def level(name: str) -> float:
        return fmean(fmean(score.mean for score in _points(each, name)) for each in comparisons)

    return names if len(names) <= 6 else sorted(names, key=level, reverse=True)


def _levels(comparison: Comparison) -> dict[str, Score]:
    """The scores that are drawn as level lines."""
    return {"full": comparison.full} | ({"none": comparison.none} if comparison.none else {})


def _points(comparison: Comparison, name: str) -> Sequence[Score]:
    single = _levels(comparison) | comparison.adaptive
    return (single[name],) if name in single else comparison.curves[name]


def _label(name: str) -> str:
    return STYLES[name].label if name in STYLES else name


def _curves(axes: Axes, comparison: Comparison, best: str) -> dict[str, Any]:
    """Draw one panel; the handle of each name for the legend."""
    looks = styles(list(comparison.curves), best)
    drawn: dict[str, Any] = {}
    for name, curve in comparison.curves.items():
        # Keeping every token is `full` for every reducer, so each curve ends there.
        points = (*(score for score in curve if score.keep < 1), comparison.full)
        drawn[name] = _curve(axes, points, looks[name], 5 if name == best else 4)
    for name, score in comparison.adaptive.items():
        look = looks.get(name.removesuffix(ADAPTIVE), Style(name, INK))
        drawn[name] = _star(axes, score, look)
    for name, level in _levels(comparison).items():
        look = looks[name]
        drawn[name] = axes.axhline(
            100 * level.mean, color=look.color, linestyle=look.line, linewidth=1.2, zorder=1
        )
    axes.set_title(comparison.title)
    axes.set_xlabel("kept fraction of the visual tokens")
    axes.set_ylabel("score, %")
    axes.set_xticks(np.arange(1, 11) / 10)
    axes.set_xlim(0.05, 1.03)
    axes.grid(axis="y", color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    return drawn


def _curve(axes: Axes, curve: Sequence[Score], look: Style, above: int) -> Any:
    keep, mean, low, high = np.array([[score.keep, score.mean, score.low, score.high] for score in curve]).T
    drawn: dict[str, Any] = {"color": look.color, "linestyle": look.line, "marker": look.marker}
    if look.muted:
        return axes.plot(keep, 100 * mean, linewidth=0.9, markersize=2.6, alpha=0.85, zorder=3, **drawn)[0]
    axes.fill_between(keep, 100 * low, 100 * high, color=look.color, alpha=0.15, linewidth=0, zorder=2)
    return axes.plot(keep, 100 * mean, linewidth=1.6, markersize=3.6, zorder=above, **drawn)[0]


def _star(axes: Axes, score: Score, look: Style) -> Any:
    low, high = score.mean - score.low, score.high - score.mean
    return axes.errorbar(
        score.keep,
        100 * score.mean,
        yerr=[[100 * low], [100 * high]],
        color=look.color,
        marker="*",
        markersize=9,
        markeredgecolor="white",
        markeredgewidth=0.6,
        elinewidth=1,
        linestyle="none",
        zorder=6,
    )


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
        axes.text(0.41, height, _wrapped(row.prediction, 22, 1) or "(no answer)", color=color, **place)


def _wrapped(text: str, width: int, lines: int) -> str:
    return "\n".join(textwrap.wrap(drawable(text), width, max_lines=lines, placeholder=" …"))
