"""How all figures look, and how one becomes a PNG."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font

from atr.reporting.text import shortened

INK, RULE = "#222222", "#d9d9d9"
"""Colours of text and of grid lines."""
FONT = "DejaVu Sans"
"""Comes with matplotlib, so that a picture is the same on every machine."""
_LOOK: Any = {
    "figure.dpi": 200,
    "font.family": FONT,
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,  # a dollar sign in an answer is a dollar sign
    "axes.edgecolor": "#777777",
    "axes.labelcolor": INK,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.handlelength": 2.6,
}


@contextmanager
def theme() -> Iterator[None]:
    """Our style over matplotlib's defaults, not over a user's matplotlibrc: equal data give equal bytes."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_LOOK)
        yield


def drawable(text: str) -> str:
    """Text of the data as a figure can draw it; a box is a character that the font does not have."""
    return "".join(character if ord(character) in _glyphs() else "□" for character in shortened(text))


@cache
def _glyphs() -> frozenset[int]:
    """The characters that the font has in both of the weights that are used."""
    fonts = [findfont(FontProperties(family=FONT, weight=weight)) for weight in ("normal", "bold")]
    return frozenset.intersection(*(frozenset(get_font(font).get_charmap()) for font in fonts))


def png(figure: Figure, **crop: Any) -> bytes:
    """The picture as a file, without the name of the program that made it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None}, **crop)
    return buffer.getvalue()
