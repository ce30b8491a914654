import io
import warnings
from dataclasses import replace

import matplotlib as mpl
import numpy as np
import pytest
from PIL import Image

from atr.core import catalog
from atr.reporting import examples, figures
from atr.reporting.results import Masks
from atr.reporting.style import drawable

GREY = (158, 163, 168)


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def drawn(png, color):
    """Where a picture has about this colour, as (row, column) of each pixel."""
    return np.argwhere(np.abs(pixels(png) - color).max(axis=-1) <= 3)


def rgb(color):
    return tuple(int(color[place : place + 2], 16) for place in (1, 3, 5))


@pytest.fixture
def page():
    """Kept patches of one white page under a mask."""

    def picture(kept, grid=(4, 6)):
        return figures.draw_pages(
            ["a"], lambda name: Image.new("RGB", (90, 60), "white"), {"r": Masks(grid, 0.5, {"a": kept})}
        )

    return picture


def test_a_plot_has_the_papers_four_lines_and_a_band(measured):
    png = figures.draw_curves(measured.groups[:1])
    for look in figures.STYLES.values():
        assert len(drawn(png, rgb(look.color))) > 50, look.label


def test_equal_results_give_equal_bytes_whatever_the_users_style(measured):
    plain = figures.draw_curves(measured.groups)
    with mpl.rc_context({"font.size": 20, "axes.facecolor": "red", "savefig.dpi": 30}):
        assert figures.draw_curves(measured.groups) == plain
    assert pixels(plain).shape[1] == 2 * pixels(figures.draw_curves(measured.groups[:1])).shape[1]


def test_the_style_of_the_user_is_left_as_it_was(measured):
    with mpl.rc_context({"font.size": 20}):
        figures.draw_curves(measured.groups[:1])
        assert mpl.rcParams["font.size"] == 20


def test_twenty_reducers_look_different_from_each_other():
    names = ["selector", "random", "ours", *(f"peer {number}" for number in range(18))]
    styles = figures.line_styles(names, "ours")
    assert len({(look.color, str(look.line), look.marker) for look in styles.values()}) == len(names) + 2
    assert styles["random"] == figures.STYLES["random"] == figures.line_styles(names, "random")["random"]
    assert [name for name in names if not styles[name].muted] == ["selector", "random", "ours"]
    assert styles == figures.line_styles(names, "ours")


EVERY = [
    name
    for folder in (catalog.PEERS, catalog.TRAINED)
    for name in catalog.names(folder)
    if catalog.reducer_traits(name).budget == "asked"
]


@pytest.mark.parametrize("best", EVERY)
def test_every_two_reducers_there_are_look_different_whichever_is_the_best(best):
    styles = figures.line_styles(EVERY, best)
    assert len({(look.color, str(look.line), look.marker) for look in styles.values()}) == len(EVERY) + 2
    assert len(styles) == len(EVERY) + 2, "and full, and none"


def test_missing_glyphs_become_boxes_and_invisible_characters_escapes():
    assert drawable("a\u6f22\u5b57\x07 é✓ \u202e") == "a□□\\x07 é✓ \\u202e"
    assert len(drawable("w" * 10_000)) == 300


def test_a_long_legend_stands_beside_the_panels_and_covers_none(crowd, measured, peers):
    short = {name: f"peer-{place:02d}" for place, name in enumerate(peers)}
    renamed = [
        replace(group, curves={short.get(name, name): curve for name, curve in group.curves.items()})
        for group in crowd.groups
    ]
    few, many = figures.draw_curves(measured.groups), figures.draw_curves(renamed)
    black = rgb(figures.STYLES["full"].color)
    line = [drawn(png, black) for png in (few, many)]
    # The dashes in the panels reach as far as without it; the legend's own are to the right of them all.
    assert line[0][:, 1].max() < pixels(few).shape[1] < line[1][:, 1].max()
    beside = pixels(many)[:, pixels(few).shape[1] :]
    assert pixels(many).shape[1] == pixels(few).shape[1] + 320
    for look in figures.line_styles(list(renamed[0].curves), "selector").values():
        seen = np.abs(beside - rgb(look.color)).max(axis=-1) <= 25
        assert seen.sum() > 5, look.label


def test_an_adaptive_count_is_a_star_at_the_fraction_it_keeps_in_its_counterparts_colour(crowd):
    group = crowd.groups[0]

    def column(keep):
        star = replace(group.adaptive["selector_adaptive"], keep=keep)
        png = figures.draw_curves([replace(group, curves={}, adaptive={"selector_adaptive": star})])
        where = drawn(png, rgb(figures.STYLES["selector"].color))
        return np.median(where[where[:, 0] < 0.8 * pixels(png).shape[0], 1])  # above the legend

    few, some, many = map(column, (0.2, 0.4, 0.8))
    assert few < some and (many - few) / (some - few) == pytest.approx(3, abs=0.05)


def test_only_dropped_patches_are_grey_and_lie_where_the_mask_says(page):
    assert len(drawn(page(list(range(24))), GREY)) == 0
    everything = len(drawn(page([]), GREY))
    for dropped in ([23], [0, 1, 2, 6], list(range(12, 24))):
        grey = drawn(page([patch for patch in range(24) if patch not in dropped]), GREY)
        assert len(grey) / everything == pytest.approx(len(dropped) / 24, abs=0.005)
    whole = drawn(page([]), GREY)
    top, left = whole.min(axis=0)
    height, width = (np.ptp(whole, axis=0) + 1) / (4, 6)
    for patch in (5, 6, 23):
        row, column = divmod(patch, 6)
        grey = drawn(page([other for other in range(24) if other != patch]), GREY)
        center = (top + (row + 0.5) * height, left + (column + 0.5) * width)
        assert grey.mean(axis=0) == pytest.approx(center, abs=2)


def test_text_of_the_data_is_drawn_as_it_is(measured, synthetic):
    with warnings.catch_warnings(action="error"):
        png = figures.draw_examples(examples.choose_cases(examples.find_cases(measured), 4), synthetic.image)
    assert len(drawn(png, rgb("#1b7837"))) and len(drawn(png, rgb("#b2182b")))
