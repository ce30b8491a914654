"""How all figures look, and how one becomes a PNG."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

INK, RULE = "#222222", "#d9d9d9"
"""Colours of text and of grid lines."""
_LOOK: Any = {
    "figure.dpi": 200,
    "font.family": "DejaVu Sans",
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


def png(figure: Figure, **crop: Any) -> bytes:
    """The picture as a file, without the name of the program that made it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None}, **crop)
    return buffer.getvalue()
