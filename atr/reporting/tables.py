"""The tables of the report, and how they are written in Markdown."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from atr.reporting import examples
from atr.reporting.headlines import relative
from atr.reporting.intrinsic import Cost, Line, Measure, Spent
from atr.reporting.paired import OUTCOMES, Difference, Match, Versus
from atr.reporting.results import Comparison, Results, Score, flat
from atr.reporting.text import printable

MISSING = "—"
_ESCAPES = str.maketrans({"|": r"\|", "<": "&lt;", ">": "&gt;"})


@dataclass(frozen=True)
class Table:
    """Blocks of rows of text; the first column names the rows, the others are numbers if `numeric`."""

    title: str
    header: list[str]
    blocks: list[list[list[str]]]
    numeric: bool = True


def scores(comparison: Comparison) -> Table:
    """Score in % at each kept fraction, and its share of the full score."""
    full, keeps = comparison.full.mean, comparison.keeps
    means = {name: [comparison.mean(name, keep) for keep in keeps] for name in comparison.curves}
    absolute = [[name, *map(_percent, line)] for name, line in means.items()]
    held = [
        [f"{name}, % of full", *(_percent(None if mean is None else relative(mean, full)) for mean in line)]
        for name, line in means.items()
    ]
    title = f"{comparison.title}: all tokens {_percent(full)}"
    if comparison.none:
        title += f", no image {_percent(comparison.none.mean)}"
    return Table(title, _kept(keeps), [absolute, held])


def tokens(comparison: Comparison) -> Table:
    """Mean visual tokens of a question at each kept fraction; reducers with equal ones share a row."""
    lines: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for name in comparison.curves:
        lines[tuple(_tokens(comparison.at(name, keep)) for keep in comparison.keeps)].append(name)
    rows = [[", ".join(names), *line] for line, names in lines.items()]
    title = f"{comparison.title}: visual tokens of a question, in all {_tokens(comparison.full)}"
    return Table(title, _kept(comparison.keeps), [rows])


def differences(versus: Versus) -> Table:
    """Points by which the best reducer leads each other one, with the paired interval in brackets."""
    rows = [
        [f"{versus.best} minus {name}", *(_difference(line.get(keep)) for keep in versus.keeps)]
        for name, line in versus.others.items()
    ]
    title = f"{versus.comparison.title}: points above each other reducer"
    return Table(title, _kept(versus.keeps), [rows])


def outcomes(versus: Versus) -> Table:
    """Against whom the best reducer wins, ties or loses at each kept fraction, and how often."""
    rows = [
        [name, *(line[keep].outcome if keep in line else MISSING for keep in versus.keeps)]
        for name, line in versus.others.items()
    ]
    counts = [versus.outcomes(keep) for keep in versus.keeps]
    totals = [[f"{outcome}, count", *(str(count[outcome]) for count in counts)] for outcome in OUTCOMES]
    return Table(f"{versus.comparison.title}: {versus.best} against", _kept(versus.keeps), [rows, totals])


def matches(found: Sequence[Match]) -> Table:
    """Adaptive counts beside the fixed counts of the same reducer at the same mean tokens, scores in %."""
    blocks: dict[str, list[list[str]]] = defaultdict(list)
    for match in found:
        difference, score = match.difference, match.score
        blocks[match.comparison.title].append(
            [
                f"{match.comparison.title}: {match.adaptive}",
                _tokens(score),
                f"{score.keep:.2f}",
                _percent(score.mean),
                _percent(match.fixed),
                _difference(difference),
                difference.outcome if difference else MISSING,
            ]
        )
    header = ["reducer", "mean tokens", "kept", "adaptive", "fixed", "adaptive minus fixed", "outcome"]
    return Table("Adaptive and fixed counts at equal mean tokens", header, list(blocks.values()))


def reconstruction(measure: Measure) -> Table:
    """Unexplained variance at each kept fraction, for each of the two reconstructors."""
    blocks = [
        [[name, *_decimals(getattr(each, key), 3)] for name, each in measure.reducers.items()]
        for key in ("reconstruction", "reconstruction_random")
    ]
    for row in blocks[1]:
        row[0] += ", by the reconstructor of random masks"
    return Table("Unexplained variance of the reconstructed features", _kept(measure.keep), blocks)


def coverage(measure: Measure) -> Table | None:
    """Written characters whose token is kept, in %; None where it is not known of any reducer."""
    known = {name: each.text_coverage for name, each in measure.reducers.items() if each.text_coverage}
    rows = [[name, *map(_percent, line)] for name, line in known.items()]
    return Table("Written characters whose token is kept, %", _kept(measure.keep), [rows]) if rows else None


def stability(measure: Measure) -> Table | None:
    """Agreement of selectors that were trained with different seeds; None where there was one."""
    if measure.stability is None:
        return None
    title = f"Overlap (IoU) of the selector's tokens over {measure.stability.seeds} training seeds"
    row = ["selector", *_decimals(measure.stability.iou, 3)]
    return Table(title, _kept(measure.stability.keep), [[row]])


def cost(measured: Cost) -> Table:
    """Milliseconds an image of selection, of the prefill that it saves, and what remains; by batch size."""
    blocks: dict[int, list[list[str]]] = defaultdict(list)
    for entry in sorted(measured.entries, key=lambda entry: (entry.batch, entry.tokens, entry.kept)):
        blocks[entry.batch].append(_cost(entry, measured.saved(entry)))
    header = ["reducer", "batch", "tokens", "kept", "selection", "prefill saved", "net"]
    return Table(f"Milliseconds an image on {measured.device}", header, list(blocks.values()))


def agreement(results: Results, answered: list[examples.Case]) -> Table:
    """How often the selector and random are right where all tokens are, for each benchmark."""
    rows = []
    for comparison in results.benchmarks:
        counts = examples.agreement(answered, comparison.name)
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
        for key, value in flat(nested).items():
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
    """The table as GitHub writes it, without its title."""
    rule = ["---", *["---:" if table.numeric else "---"] * (len(table.header) - 1)]
    rows = [table.header, *(row for block in table.blocks for row in block)]
    lines = [[escaped(cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:]))


def escaped(text: str) -> str:
    """The text on one line of Markdown: no bar ends a cell, and nothing in it is markup, link or picture."""
    return printable(text).translate(_ESCAPES).replace("](", "]\\(")


def _percent(value: float | None) -> str:
    return MISSING if value is None else f"{100 * value:.1f}"


def _tokens(score: Score | None) -> str:
    """Those kept, and those fed where newlines were beside them."""
    if score is None:
        return MISSING
    fed = f" ({score.tokens_fed:.1f} fed)" if score.tokens_fed != score.tokens else ""
    return f"{score.tokens:.1f}{fed}"


def _difference(difference: Difference | None) -> str:
    """In points, with the interval."""
    if difference is None:
        return MISSING
    mean, low, high = (100 * value for value in (difference.mean, difference.low, difference.high))
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def _decimals(line: Line, digits: int) -> list[str]:
    return [f"{value:.{digits}f}" for value in line]


def _kept(keeps: Sequence[float]) -> list[str]:
    return ["kept", *(f"{keep:g}" for keep in keeps)]


def _cost(entry: Spent, saved: float | None) -> list[str]:
    counts = [str(count) for count in (entry.batch, entry.tokens, entry.kept)]
    gain = [MISSING, MISSING] if saved is None else [f"{saved:.2f}", f"{saved - entry.milliseconds:+.2f}"]
    return [entry.reducer, *counts, f"{entry.milliseconds:.2f}", *gain]
