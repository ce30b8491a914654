"""The style of all figures, and their encoding as PNG."""

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
"""Shipped with matplotlib, so that figures are the same on every machine."""
_RC_PARAMS: Any = {
    "figure.dpi": 200,
    "font.family": FONT,
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,  # a dollar sign in an answer does not start a formula
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
    """Our style on matplotlib's defaults, without the user's matplotlibrc: equal data give equal bytes."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_RC_PARAMS)
        yield


def drawable(text: str) -> str:
    """The shortened text with a box for every character that the font lacks."""
    return "".join(character if ord(character) in _glyphs() else "□" for character in shortened(text))


@cache
def _glyphs() -> frozenset[int]:
    """The characters that the font has in both weights we use."""
    fonts = [findfont(FontProperties(family=FONT, weight=weight)) for weight in ("normal", "bold")]
    return frozenset.intersection(*(frozenset(get_font(font).get_charmap()) for font in fonts))


def png(figure: Figure, **crop: Any) -> bytes:
    """The figure as PNG, without the software's name and version in its metadata."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None}, **crop)
    return buffer.getvalue()
