"""The paper's figures as PNG: curves, kept patches (Figure 1) and answers (Figure 8)."""

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

from atr.reporting.examples import SHOWN, Case, is_right
from atr.reporting.results import Comparison, Masks, ScorePoint, fixed_counterpart
from atr.reporting.style import INK, RULE, drawable, png, theme

ImageLookup = Callable[[str], Image.Image]
"""Maps the id of an image to the image."""


@dataclass(frozen=True)
class LineStyle:
    """Style of a reducer's line in every plot; a muted line is thin and has no band."""

    label: str
    color: str
    line: Any = "-"
    marker: str = ""
    muted: bool = False


STYLES = {
    "selector": LineStyle("selector", "#b2182b", marker="o"),
    "random": LineStyle("random", "#2166ac", marker="s"),
    "full": LineStyle("all tokens", "#1a1a1a", line=(0, (5, 2))),
    "none": LineStyle("no image", "#8c8c8c", line=(0, (2, 2))),
}
BEST = "#e6550d"
"""Colour of the reducer that is compared with all others, if that is not the selector."""
PEER_STYLES = tuple(
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
"""Muted colours, lines and markers of the other reducers; more combinations than there are reducers."""
_RIGHT, _WRONG = "#1b7837", "#b2182b"
_DROPPED = (0.62, 0.64, 0.66, 1.0)


def draw_curves(comparisons: Sequence[Comparison], best: str = "selector") -> bytes:
    """Score against kept fraction, one panel for each comparison and one legend for all.

    A star is an adaptive count at its mean kept fraction, in the colour of its fixed counterpart.
    A long legend stands beside the panels, with the highest line first; a short one is below them.
    """
    with theme():
        labels = _legend_names(comparisons)
        long = len(labels) > 6
        width, height = 4.4 * len(comparisons) + 1.6 * long, max(3.5, 0.3 + 0.17 * len(labels) * long)
        figure = Figure(figsize=(width, height), layout="constrained")
        panels = figure.subplots(1, len(comparisons), squeeze=False)[0]
        for axes, comparison in zip(panels, comparisons, strict=True):
            drawn = _draw_panel(axes, comparison, best)
        columns = 1 if long else len(labels) if len(labels) <= 4 else 3
        handles, texts = [drawn[name] for name in labels], [_label(name) for name in labels]
        place: Any = "outside right upper" if long else "outside lower center"
        figure.legend(handles, texts, loc=place, ncols=columns)
        return png(figure)


def draw_pages(images: Sequence[str], image: ImageLookup, masks: dict[str, Masks]) -> bytes:
    """One row per image: the image, then the patches that each reducer keeps, others grey (Figure 1)."""
    with theme():
        figure = Figure(figsize=(1.9 * (1 + len(masks)), 1.9 * len(images) + 0.35), layout="constrained")
        grid = figure.subplots(len(images), 1 + len(masks), squeeze=False)
        for line, name in zip(grid, images, strict=True):
            picture = image(name)
            _draw_picture(line[0], picture)
            line[0].set_ylabel(drawable(name)[:40], fontsize=7.5)
            for axes, mask in zip(line[1:], masks.values(), strict=True):
                _draw_patches(axes, picture, mask.grid_of(name), mask.kept[name])
        for axes, title in zip(grid[0], ["image", *map(_column_title, masks.items())], strict=True):
            axes.set_title(title, fontsize=9)
        return png(figure)


def draw_examples(cases: Sequence[Case], image: ImageLookup, columns: int = 3) -> bytes:
    """Images with their question and the answers of each reducer, marked right or wrong (Figure 8)."""
    with theme():
        rows = -(-len(cases) // columns)
        figure = Figure(figsize=(2.5 * columns, 3.65 * rows), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False).flat
        for axes in grid:
            axes.set_axis_off()
        for axes, case in zip(figure.axes, cases, strict=False):
            _draw_example(axes, case, image(case.row.image))
        return png(figure, bbox_inches="tight", pad_inches=0.05)


def line_styles(reducers: Sequence[str], best: str) -> dict[str, LineStyle]:
    """The fixed styles of the paper's lines, that of the best reducer, and a muted one for each other."""
    fixed = {best: LineStyle(best, BEST, marker="o")} | STYLES
    peers = [name for name in reducers if name not in fixed]
    muted = (PEER_STYLES[number % len(PEER_STYLES)] for number in range(len(peers)))
    return fixed | {
        name: LineStyle(name, *style, muted=True) for name, style in zip(peers, muted, strict=True)
    }


def _legend_names(comparisons: Sequence[Comparison]) -> list[str]:
    """Names of all lines and stars: by mean score if there are many, else in the order of the results."""
    first = comparisons[0]
    names = [*first.curves, *first.adaptive, *_levels(first)]

    def level(name: str) -> float:
        return fmean(fmean(score.mean for score in _points(part, name)) for part in comparisons)

    return names if len(names) <= 6 else sorted(names, key=level, reverse=True)


def _levels(comparison: Comparison) -> dict[str, ScorePoint]:
    """The scores that are drawn as horizontal lines."""
    return {"full": comparison.full} | ({"none": comparison.none} if comparison.none else {})


def _points(comparison: Comparison, name: str) -> Sequence[ScorePoint]:
    single = _levels(comparison) | comparison.adaptive
    return (single[name],) if name in single else comparison.curves[name]


def _label(name: str) -> str:
    return STYLES[name].label if name in STYLES else name


def _draw_panel(axes: Axes, comparison: Comparison, best: str) -> dict[str, Any]:
    """Draw one panel; returns the legend's handle of each name."""
    styles = line_styles(list(comparison.curves), best)
    drawn: dict[str, Any] = {}
    for name, curve in comparison.curves.items():
        # Keeping every token is `full` for every reducer, so each curve ends there.
        points = (*(score for score in curve if score.keep < 1), comparison.full)
        drawn[name] = _draw_curve(axes, points, styles[name], 5 if name == best else 4)
    for name, score in comparison.adaptive.items():
        style = styles.get(fixed_counterpart(name), LineStyle(name, INK))
        drawn[name] = _draw_star(axes, score, style)
    for name, level in _levels(comparison).items():
        look: dict[str, Any] = {"color": styles[name].color, "linestyle": styles[name].line}
        drawn[name] = axes.axhline(100 * level.mean, linewidth=1.2, zorder=1, **look)
    _label_axes(axes, comparison)
    return drawn


def _label_axes(axes: Axes, comparison: Comparison) -> None:
    axes.set_title(comparison.title)
    axes.set_xlabel("kept fraction of the visual tokens")
    axes.set_ylabel("score, %")
    axes.set_xticks(np.arange(1, 11) / 10)
    axes.set_xlim(0.05, 1.03)
    axes.grid(axis="y", color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)


def _draw_curve(axes: Axes, curve: Sequence[ScorePoint], style: LineStyle, zorder: int) -> Any:
    keep, mean, low, high = np.array([[score.keep, score.mean, score.low, score.high] for score in curve]).T
    look: dict[str, Any] = {"color": style.color, "linestyle": style.line, "marker": style.marker}
    if style.muted:
        return axes.plot(keep, 100 * mean, linewidth=0.9, markersize=2.6, alpha=0.85, zorder=3, **look)[0]
    axes.fill_between(keep, 100 * low, 100 * high, color=style.color, alpha=0.15, linewidth=0, zorder=2)
    return axes.plot(keep, 100 * mean, linewidth=1.6, markersize=3.6, zorder=zorder, **look)[0]


def _draw_star(axes: Axes, score: ScorePoint, style: LineStyle) -> Any:
    low, high = score.mean - score.low, score.high - score.mean
    return axes.errorbar(
        score.keep,
        100 * score.mean,
        yerr=[[100 * low], [100 * high]],
        color=style.color,
        marker="*",
        markersize=9,
        markeredgecolor="white",
        markeredgewidth=0.6,
        elinewidth=1,
        linestyle="none",
        zorder=6,
    )


def _column_title(item: tuple[str, Masks]) -> str:
    reducer, masks = item
    return f"{reducer}, {masks.keep:.0%}".replace("%", " %")


def _draw_picture(axes: Axes, picture: Image.Image) -> tuple[int, int, int, int]:
    """Draw an image; the extent in which it lies."""
    width, height = picture.size
    extent = (0, width, height, 0)
    axes.imshow(picture, extent=extent, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(visible=True, color="#999999", linewidth=0.5)
    return extent


def _draw_patches(axes: Axes, picture: Image.Image, grid: tuple[int, int], kept: Sequence[int]) -> None:
    """Draw an image with the grid of its tokens, those that are not kept grey."""
    extent, (width, height) = _draw_picture(axes, picture), picture.size
    axes.imshow(_veil(grid, kept), extent=extent, interpolation="nearest")
    axes.vlines(np.linspace(0, width, grid[1] + 1), 0, height, color="white", linewidth=0.3)
    axes.hlines(np.linspace(0, height, grid[0] + 1), 0, width, color="white", linewidth=0.3)


def _veil(grid: tuple[int, int], kept: Sequence[int]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """RGBA of each patch: opaque grey if it is dropped, transparent if it is kept."""
    veil = np.tile(_DROPPED, (grid[0] * grid[1], 1))
    veil[list(kept)] = 0
    return veil.reshape(*grid, 4)


def _draw_example(axes: Axes, case: Case, picture: Image.Image) -> None:
    """Draw an image with the question above it and the answers below it."""
    axes.set_axis_on()
    _draw_picture(axes, picture)
    axes.set_title(_wrapped(f"{case.row.benchmark}: {case.row.question}", 34, 2), fontsize=8, loc="left")
    for line, name in enumerate(SHOWN):
        row = case.answers[name]
        color, mark = (_RIGHT, "✓") if is_right(row) else (_WRONG, "✗")
        height = -0.04 - 0.09 * line
        place: dict[str, Any] = {"transform": axes.transAxes, "va": "top", "fontsize": 8}
        axes.text(0, height, STYLES[name].label, **place)
        axes.text(0.33, height, mark, color=color, **place)
        axes.text(0.41, height, _wrapped(row.prediction, 22, 1) or "(no answer)", color=color, **place)


def _wrapped(text: str, width: int, lines: int) -> str:
    return "\n".join(textwrap.wrap(drawable(text), width, max_lines=lines, placeholder=" …"))
