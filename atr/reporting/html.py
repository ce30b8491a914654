"""The report as one HTML page: pictures are embedded, text is escaped, nothing is fetched."""

import base64
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from atr.reporting import captions
from atr.reporting.examples import SHOWN, is_right
from atr.reporting.figures import STYLES
from atr.reporting.report import ReportContent
from atr.reporting.text import printable, shortened

PAGE_TEMPLATE = Path(__file__).with_name("report.html.jinja")


def render_html(report: ReportContent) -> str:
    """Fill the template; jinja2 escapes every value, so that no text of the data becomes markup."""
    environment = Environment(
        loader=FileSystemLoader(PAGE_TEMPLATE.parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"inlined": _inlined, "shortened": shortened}
    environment.tests["right"] = is_right
    shown = [(name, STYLES[name].label) for name in SHOWN]
    template = environment.get_template(PAGE_TEMPLATE.name)
    return template.render(report=report, captions=captions, shown=shown)


def _printable(value: Any) -> Any:
    """Make text printable, but not the template's own markup."""
    return printable(value) if type(value) is str else value


def _inlined(png: bytes) -> str:
    """A PNG as a data URL for an <img>."""
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"
