"""The figure of robustness: overlap and change of score under each variant of the deployment."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from atr.reporting.figures import LineStyle, line_styles
from atr.reporting.robustness import ReducerChanges, RobustnessResults, ScoreChange, VariantChanges
from atr.reporting.style import RULE, png, theme


def draw_robustness(robustness: RobustnessResults, best: str) -> bytes:
    """Overlap and change of score of every reducer: one row per variant, two panels per kept fraction.

    Hollow marks are the overlap on photographs, for variants that change no pixel of the questions' images.
    """
    variants, keeps = robustness.variants, robustness.keep
    with theme():
        size = 2.4 + 4.2 * len(keeps), 1.4 + 0.26 * len(variants)
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(1, 2 * len(keeps), sharey=True)
        for place, keep in enumerate(keeps):
            overlap, points = panels[2 * place : 2 * place + 2]
            overlap.set_title(f"IoU, {keep:g} kept", loc="left")
            points.set_title(f"points, {keep:g} kept", loc="left")
            _draw_panels(overlap, points, robustness, place, best)
        panels[0].set_yticks(range(len(variants)), [variant.name for variant in variants])
        panels[0].invert_yaxis()
        for axes in panels:
            axes.grid(axis="both", color=RULE, linewidth=0.4)
            axes.set_axisbelow(True)
        handles, labels = panels[1].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 6))
        return png(figure)


def _draw_panels(overlap: Axes, points: Axes, robustness: RobustnessResults, place: int, best: str) -> None:
    """Draw the two panels of the kept fraction at `place`; reducers are offset in each row."""
    names, variants = list(robustness.reference), robustness.variants
    styles = line_styles(names, best)
    full = [variant.full for variant in variants if variant.full]
    if full:
        _draw_intervals(points, full, styles["full"], 0.0)
    for number, name in enumerate(names):
        offset = 0.6 * ((number + 1) / (len(names) + 1) - 0.5)
        lines = [variant.reducers[name] for variant in variants]
        _draw_overlaps(overlap, lines, variants, place, styles[name], offset)
        _draw_intervals(points, [line.change[place] for line in lines], styles[name], offset)


def _draw_overlaps(
    axes: Axes,
    lines: Sequence[ReducerChanges],
    variants: Sequence[VariantChanges],
    place: int,
    style: LineStyle,
    offset: float,
) -> None:
    for row, (line, variant) in enumerate(zip(lines, variants, strict=True)):
        hollow = variant.no_pixel_changed
        overlap = (line.photographs if hollow else line.iou)[place]
        if overlap:
            look: dict[str, Any] = {"color": style.color, "mfc": "none" if hollow else style.color}
            axes.plot(overlap.mean, row + offset, style.marker or "|", markersize=4.5, **look)


def _draw_intervals(axes: Axes, changes: Sequence[ScoreChange], style: LineStyle, offset: float) -> None:
    means = [100 * change.mean for change in changes]
    spans = [[100 * (change.mean - change.low), 100 * (change.high - change.mean)] for change in changes]
    axes.errorbar(
        means,
        [row + offset for row in range(len(changes))],
        xerr=list(zip(*spans, strict=True)),
        fmt=style.marker or "|",
        color=style.color,
        markersize=4.5,
        elinewidth=0.9,
        label=style.label,
    )
