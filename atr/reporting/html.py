"""The report as one HTML page: pictures inlined, text escaped, nothing fetched."""

import base64
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from atr.reporting.examples import LINES
from atr.reporting.figures import STYLES
from atr.reporting.report import (
    COST_NOTE,
    CURVES_NOTE,
    DIFFERENCES_NOTE,
    MATCHES_NOTE,
    MEASURE_NOTE,
    SCORES_NOTE,
    Report,
)
from atr.reporting.robustness import ROBUSTNESS_NOTE
from atr.reporting.text import printable, shortened

TEMPLATE = Path(__file__).with_name("report.html.jinja")


def render(report: Report) -> str:
    """Fill the template; every value is printable, and escaped by jinja2: no text of the data is markup."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATE.parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_finalized,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"inlined": _inlined, "shortened": shortened}
    return environment.get_template(TEMPLATE.name).render(
        report=report,
        lines=[(name, STYLES[name].label) for name in LINES],
        curves_note=CURVES_NOTE,
        differences_note=DIFFERENCES_NOTE,
        matches_note=MATCHES_NOTE,
        scores_note=SCORES_NOTE,
        measure_note=MEASURE_NOTE,
        cost_note=COST_NOTE,
        robustness_note=ROBUSTNESS_NOTE,
    )


def _finalized(value: Any) -> Any:
    """Text as it may be shown; markup is the template's own."""
    return printable(value) if type(value) is str else value


def _inlined(png: bytes) -> str:
    """A PNG as the data address of an <img>."""
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"
