"""The report as a Markdown file, with its pictures beside it in `figures/`."""

from atr.reporting import captions
from atr.reporting.report import ReportContent
from atr.reporting.sections import DifferenceSection, IntrinsicSection, Picture, RobustnessSection
from atr.reporting.tables import Table, escape_markdown, markdown_table


def render_markdown(report: ReportContent) -> str:
    """The report in Markdown, with the sections in the order of the HTML page."""
    blocks = [
        "# Adaptive visual token reduction",
        escape_markdown(report.subtitle),
        _list(report.headlines),
        "## Groups",
        captions.CURVES_NOTE,
        _picture(report.both_groups),
        *_differences(report.differences),
        "## Benchmarks",
        *map(_picture, report.benchmarks),
        "## Kept patches",
        *map(_picture, report.pages),
        "## Answers",
        _picture(report.examples) if report.examples else report.examples_note,
        *([_table(report.agreement)] if report.agreement else ()),
        "## Scores",
        captions.SCORES_NOTE,
        *map(_table, report.scores),
        *(_intrinsic(report.intrinsic) if report.intrinsic else ()),
        *(("## Latency", captions.LATENCY_NOTE, _table(report.latency)) if report.latency else ()),
        *(_robustness(report.robustness) if report.robustness else ()),
        "## Encoder",
        _picture(report.components),
        "## Pretraining",
        _table(report.pretraining),
        "## Provenance",
        _table(report.provenance),
        _table(report.parameters),
    ]
    return "\n\n".join(blocks) + "\n"


def _differences(section: DifferenceSection) -> list[str]:
    matches = [captions.MATCHES_NOTE, _table(section.matches)] if section.matches else []
    return [
        "## Differences",
        captions.DIFFERENCES_NOTE,
        _list(section.sentences),
        *map(_picture, section.pictures),
        *map(_table, section.tables),
        *matches,
    ]


def _intrinsic(section: IntrinsicSection) -> list[str]:
    picture = [_picture(section.overlap)] if section.overlap else []
    return ["## Without a language model", captions.INTRINSIC_NOTE, *map(_table, section.tables), *picture]


def _robustness(section: RobustnessSection) -> list[str]:
    pages = [_picture(section.picture), *map(_table, section.tables)]
    return ["## Robustness to deployment", captions.ROBUSTNESS_NOTE, *pages]


def _list(sentences: list[str]) -> str:
    return "\n".join(f"- {escape_markdown(sentence)}" for sentence in sentences)


def _picture(picture: Picture) -> str:
    return f"![{picture.name}](figures/{picture.name}.png)\n\n*{escape_markdown(picture.caption)}*"


def _table(table: Table) -> str:
    return f"**{escape_markdown(table.title)}**\n\n{markdown_table(table)}"
