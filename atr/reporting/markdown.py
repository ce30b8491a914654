"""The report as a Markdown file whose pictures lie beside it in `figures/`."""

from atr.reporting.report import (
    COST_NOTE,
    CURVES_NOTE,
    DIFFERENCES_NOTE,
    MATCHES_NOTE,
    MEASURE_NOTE,
    SCORES_NOTE,
    Compared,
    Measured,
    Picture,
    Report,
    Robust,
)
from atr.reporting.robustness import ROBUSTNESS_NOTE
from atr.reporting.tables import Table, markdown


def render(report: Report) -> str:
    """Sections in the order of the HTML page."""
    sections = [
        "# Adaptive visual token reduction",
        report.subtitle,
        _list(report.headlines),
        "## Groups",
        CURVES_NOTE,
        _picture(report.both_groups),
        *_compared(report.compared),
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
        *(_measured(report.measured) if report.measured else ()),
        *(("## Cost", COST_NOTE, _table(report.cost)) if report.cost else ()),
        *(_robust(report.robust) if report.robust else ()),
        "## Encoder",
        _picture(report.components),
        "## Pretraining",
        _table(report.pretraining),
        "## Provenance",
        _table(report.provenance),
        _table(report.parameters),
    ]
    return "\n\n".join(sections) + "\n"


def _compared(compared: Compared) -> list[str]:
    matches = [MATCHES_NOTE, _table(compared.matches)] if compared.matches else []
    return [
        "## Differences",
        DIFFERENCES_NOTE,
        _list(compared.verdicts),
        *map(_picture, compared.pictures),
        *map(_table, compared.tables),
        *matches,
    ]


def _measured(measured: Measured) -> list[str]:
    pages = [*map(_table, measured.tables), _picture(measured.overlap)]
    return ["## Without a language model", MEASURE_NOTE, *pages]


def _robust(robust: Robust) -> list[str]:
    pages = [_picture(robust.picture), *map(_table, robust.tables)]
    return ["## Where deployment differs", ROBUSTNESS_NOTE, *pages]


def _list(sentences: list[str]) -> str:
    return "\n".join(f"- {sentence}" for sentence in sentences)


def _picture(picture: Picture) -> str:
    return f"![{picture.name}](figures/{picture.name}.png)\n\n*{picture.caption}*"


def _table(table: Table) -> str:
    return f"**{table.title}**\n\n{markdown(table)}"
