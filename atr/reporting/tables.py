"""The tables of the report, and how they are written in Markdown."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from atr.reporting import cases
from atr.reporting.headlines import relative
from atr.reporting.results import Comparison, Results

MISSING = "—"
_ESCAPES = str.maketrans({"|": r"\|", "<": "&lt;", ">": "&gt;", "\n": " "})


@dataclass(frozen=True)
class Table:
    """Blocks of rows of text; the first column names the rows, the others are numbers if `numeric`."""

    title: str
    header: list[str]
    blocks: list[list[list[str]]]
    numeric: bool = True


def scores(comparison: Comparison) -> Table:
    """Score in % at each kept fraction, its share of the full score, and the selector's lead over others."""
    full, keeps = comparison.full.mean, comparison.keeps
    means = {name: [comparison.mean(name, keep) for keep in keeps] for name in comparison.curves}
    absolute = [[name, *map(_percent, line)] for name, line in means.items()]
    held = [
        [f"{name}, % of full", *(_percent(None if mean is None else relative(mean, full)) for mean in line)]
        for name, line in means.items()
    ]
    lead = [
        [f"selector minus {name}", *map(_lead, means["selector"], line)]
        for name, line in means.items()
        if name != "selector"
    ]
    title = f"{comparison.title}: all tokens {_percent(full)}, no image {_percent(comparison.none.mean)}"
    return Table(title, ["kept", *(f"{keep:g}" for keep in keeps)], [absolute, held, lead])


def agreement(results: Results, answered: list[cases.Case]) -> Table:
    """How often the selector and random are right where all tokens are, for each benchmark."""
    rows = []
    for comparison in results.benchmarks:
        counts = cases.agreement(answered, comparison.name)
        outcomes = [(True, True), (True, False), (False, True), (False, False)]
        rows.append([comparison.name, *(str(counts[outcome]) for outcome in outcomes)])
    header = ["benchmark", "both right", "only selector", "only random", "both wrong"]
    return Table("Questions that all tokens answer rightly", header, [rows])


def pretraining(results: Results) -> Table:
    """What the pretraining measured at its end: loss terms, kept fraction, explained variance."""
    measured = sorted(results.pretraining["final"].items())
    rows = [[name.replace("_", " "), f"{value:.4g}"] for name, value in measured]
    return Table("At the end of the last epoch", ["measure", "value"], [rows])


def parameters(sources: dict[str, dict[str, Any]]) -> Table:
    """What the stages ran with; a parameter with two values has two rows, and these say whose they are."""
    stages: dict[tuple[str, str], list[str]] = defaultdict(list)
    for stage, nested in sources.items():
        for key, value in _flat(nested):
            stages[key, str(value)].append(stage)
    values = Counter(key for key, _ in stages)
    rows = []
    for (key, value), names in sorted(stages.items()):
        shown = names if values[key] > 1 else dict.fromkeys(name.split()[0] for name in names)
        rows.append([key, value, ", ".join(shown)])
    return Table("Parameters", ["parameter", "value", "stages"], [rows], numeric=False)


def provenance(sources: dict[str, dict[str, Any]]) -> Table:
    """Commit and library versions that each stage ran at."""
    packages = sorted({package for source in sources.values() for package in source["versions"]})
    rows = []
    for stage, source in sources.items():
        versions = [source["versions"].get(package, MISSING) for package in packages]
        rows.append([stage, (source["commit"] or MISSING)[:12], *versions])
    return Table("Commits and versions", ["stage", "commit", *packages], [rows], numeric=False)


def markdown(table: Table) -> str:
    """The table as GitHub writes it, without its title; bars and angle brackets in a cell are escaped."""
    rule = ["---", *["---:" if table.numeric else "---"] * (len(table.header) - 1)]
    rows = [table.header, *(row for block in table.blocks for row in block)]
    lines = [[cell.translate(_ESCAPES) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:]))


def _percent(value: float | None) -> str:
    return MISSING if value is None else f"{100 * value:.1f}"


def _lead(selector: float | None, other: float | None) -> str:
    return MISSING if selector is None or other is None else f"{100 * (selector - other):+.1f}"


def _flat(nested: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of nested dicts."""
    for key, value in nested.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
