"""The report as a Markdown file whose pictures lie beside it in `figures/`."""

from atr.reporting.report import CURVES_NOTE, SCORES_NOTE, Picture, Report
from atr.reporting.tables import Table, markdown


def render(report: Report) -> str:
    """Sections in the order of the HTML page."""
    sections = [
        "# Adaptive visual token reduction",
        report.subtitle,
        "\n".join(f"- {sentence}" for sentence in report.headlines),
        "## Groups",
        CURVES_NOTE,
        _picture(report.both_groups),
        "## Benchmarks",
        *map(_picture, report.benchmarks),
        "## Kept patches",
        *map(_picture, report.pages),
        "## Answers",
        _picture(report.examples) if report.examples else report.examples_note,
        _table(report.agreement),
        "## Scores",
        SCORES_NOTE,
        *map(_table, report.scores),
        "## Encoder",
        _picture(report.components),
        "## Pretraining",
        _table(report.pretraining),
        "## Provenance",
        _table(report.provenance),
        _table(report.parameters),
    ]
    return "\n\n".join(sections) + "\n"


def _picture(picture: Picture) -> str:
    return f"![{picture.name}](figures/{picture.name}.png)\n\n*{picture.caption}*"


def _table(table: Table) -> str:
    return f"**{table.title}**\n\n{markdown(table)}"
