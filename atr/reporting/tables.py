"""The tables of the report, and their Markdown."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from atr.reporting.cells import Provenance, flatten
from atr.reporting.examples import Case, count_outcomes
from atr.reporting.headlines import relative
from atr.reporting.intrinsic import IntrinsicResults
from atr.reporting.latency import LatencyResults, SelectionTime
from atr.reporting.paired import OUTCOMES, AdaptiveMatch, Difference, PairedDifferences
from atr.reporting.results import LEADING, Comparison, Pretraining, Results, ScorePoint
from atr.reporting.robustness import MaskOverlap, RobustnessResults, ScoreChange, VariantChanges
from atr.reporting.text import printable

MISSING = "—"
NO_PIXEL_CHANGED = "no pixel changed"
_ESCAPES = str.maketrans({"|": r"\|", "<": "&lt;", ">": "&gt;"})


@dataclass(frozen=True)
class Table:
    """Blocks of rows of text; the first column names the rows, the others are numbers if `numeric`."""

    title: str
    header: list[str]
    blocks: list[list[list[str]]]
    numeric: bool = True


def score_table(comparison: Comparison) -> Table:
    """Score in % at each kept fraction, as a share of the full score, and the widths of the intervals.

    Widths are those of LEADING, which show whether random is known as well as the selector.
    """
    full, keeps = comparison.full.mean, comparison.keeps
    means = {name: [comparison.mean(name, keep) for keep in keeps] for name in comparison.curves}
    absolute = [[name, *map(_percent, line)] for name, line in means.items()]
    shares = [
        [f"{name}, % of full", *(_percent(None if mean is None else relative(mean, full)) for mean in line)]
        for name, line in means.items()
    ]
    widths = [
        [f"{name}, width of the 95 % interval", *(_width(comparison.at(name, keep)) for keep in keeps)]
        for name in LEADING
        if name in means
    ]
    title = f"{comparison.title}: score in % (all tokens {_percent(full)}"
    title += f", no image {_percent(comparison.none.mean)})" if comparison.none else ")"
    return Table(title, _keep_header(keeps), [absolute, shares, widths])


def token_table(comparison: Comparison) -> Table:
    """Mean visual tokens per question at each kept fraction; reducers with equal numbers share a row."""
    lines: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for name in comparison.curves:
        lines[tuple(_tokens(comparison.at(name, keep)) for keep in comparison.keeps)].append(name)
    rows = [[", ".join(names), *line] for line, names in lines.items()]
    title = f"{comparison.title}: visual tokens per question (all tokens {_tokens(comparison.full)})"
    return Table(title, _keep_header(comparison.keeps), [rows])


def difference_table(differences: PairedDifferences) -> Table:
    """Points by which the best reducer leads each other one, with the paired interval in brackets."""
    keeps = differences.keeps
    rows = [
        [f"{differences.best} minus {name}", *(_difference(line.get(keep)) for keep in keeps)]
        for name, line in differences.others.items()
    ]
    title = f"{differences.comparison.title}: difference in points, with its 95 % interval"
    return Table(title, _keep_header(keeps), [rows])


def outcome_table(differences: PairedDifferences) -> Table:
    """Win, tie or loss against each other reducer at each kept fraction, and how often."""
    keeps = differences.keeps
    rows = [
        [name, *(line[keep].outcome if keep in line else MISSING for keep in keeps)]
        for name, line in differences.others.items()
    ]
    counts = [differences.outcomes(keep) for keep in keeps]
    totals = [[f"{name}, total", *(str(count[name]) for count in counts)] for name in OUTCOMES]
    title = f"{differences.comparison.title}: outcome of {differences.best} against each other reducer"
    return Table(title, _keep_header(keeps), [rows, totals])


def match_table(matches: Sequence[AdaptiveMatch]) -> Table:
    """Adaptive counts against fixed counts of the same reducer at the same mean tokens, scores in %."""
    blocks: dict[str, list[list[str]]] = defaultdict(list)
    for match in matches:
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
    header = ["reducer", "mean tokens", "kept", "adaptive, %", "fixed, %", "adaptive minus fixed", "outcome"]
    return Table("Adaptive against fixed counts at equal mean tokens", header, list(blocks.values()))


def intrinsic_tables(intrinsic: IntrinsicResults) -> list[Table]:
    """Reconstruction, and text coverage and stability if they were measured."""
    tables = [reconstruction_table(intrinsic), coverage_table(intrinsic), stability_table(intrinsic)]
    return [table for table in tables if table]


def reconstruction_table(intrinsic: IntrinsicResults) -> Table:
    """Unexplained variance at each kept fraction, for each of the two reconstructors."""
    curves = intrinsic.reducers
    trained_together = [[name, *_decimals(lines.reconstruction, 3)] for name, lines in curves.items()]
    random_masks = [
        [f"{name}, reconstructor of random masks", *_decimals(lines.reconstruction_random, 3)]
        for name, lines in curves.items()
    ]
    title = "Unexplained variance of the reconstructed features"
    return Table(title, _keep_header(intrinsic.keep), [trained_together, random_masks])


def coverage_table(intrinsic: IntrinsicResults) -> Table | None:
    """Written characters whose token is kept, in %; None if no reducer was measured on text."""
    known = {name: lines.text_coverage for name, lines in intrinsic.reducers.items() if lines.text_coverage}
    rows = [[name, *map(_percent, line)] for name, line in known.items()]
    title = "Written characters whose token is kept, %"
    return Table(title, _keep_header(intrinsic.keep), [rows]) if rows else None


def stability_table(intrinsic: IntrinsicResults) -> Table | None:
    """Overlap of selectors trained with different seeds; None if there is one seed."""
    if intrinsic.stability is None:
        return None
    title = f"Overlap (IoU) of the tokens that selectors of {intrinsic.stability.seeds} training seeds keep"
    row = ["selector", *_decimals(intrinsic.stability.iou, 3)]
    return Table(title, _keep_header(intrinsic.stability.keep), [[row]])


def latency_table(latency: LatencyResults) -> Table:
    """Milliseconds per image of selection, of the prefill it saves, and their difference; by batch size."""
    blocks: dict[int, list[list[str]]] = defaultdict(list)
    for entry in sorted(latency.entries, key=lambda entry: (entry.batch, entry.tokens, entry.kept)):
        blocks[entry.batch].append(_latency_row(entry, latency.prefill_saved(entry)))
    header = ["reducer", "batch", "tokens", "kept", "selection", "prefill saved", "net gain"]
    return Table(f"Milliseconds per image on {latency.device}", header, list(blocks.values()))


def robustness_tables(robustness: RobustnessResults) -> list[Table]:
    """Overlap on the images of the questions and on photographs, and change of score; one row per variant."""
    variants = robustness.variants
    cells = [f"{name} {keep:g}" for name in robustness.reference for keep in robustness.keep]
    questions = [[variant.name, *_question_overlaps(variant)] for variant in variants]
    photographs = [[variant.name, *map(_overlap, _all(variant, "photographs"))] for variant in variants]
    title, header = "Overlap (IoU, lowest in brackets) on", ["deployment", *cells]
    return [
        Table(f"{title} the images of {robustness.questions} questions", header, [questions]),
        Table(f"{title} {robustness.photographs} photographs", header, [photographs]),
        _change_table(robustness, cells),
    ]


def agreement_table(results: Results, cases: Sequence[Case]) -> Table:
    """How often selector and random are right where all tokens are, by benchmark."""
    rows = []
    for comparison in results.benchmarks:
        counts = count_outcomes(list(cases), comparison.name)
        outcomes = [(True, True), (True, False), (False, True), (False, False)]
        rows.append([comparison.name, *(str(counts[outcome]) for outcome in outcomes)])
    header = ["benchmark", "both right", "only selector", "only random", "both wrong"]
    return Table("Questions answered correctly with all tokens, by who else is right", header, [rows])


def pretraining_table(pretraining: Pretraining) -> Table:
    """Loss terms, kept fraction and explained variance at the end of the pretraining."""
    rows = [[name.replace("_", " "), f"{value:.4g}"] for name, value in sorted(pretraining.final.items())]
    return Table("At the end of the last epoch", ["metric", "value"], [rows])


def parameter_table(sources: Mapping[str, dict[str, Any]]) -> Table:
    """Parameters by stage, or by stage and reducer; a parameter with two values has a row for each."""
    names: dict[tuple[str, str], list[str]] = defaultdict(list)
    values: dict[tuple[str, str], set[str]] = defaultdict(set)
    for source, nested in sources.items():
        for key, value in flatten(nested).items():
            names[key, str(value)].append(source)
            values[key, _stage(source)].add(str(value))
    rows = []
    for (key, value), having in sorted(names.items()):
        shown = dict.fromkeys(
            _stage(name) if len(values[key, _stage(name)]) == 1 else name for name in having
        )
        rows.append([key, value, ", ".join(shown)])
    return Table("Parameters", ["parameter", "value", "stages"], [rows], numeric=False)


def provenance_table(sources: Mapping[str, Provenance]) -> Table:
    """Commit and library versions of each stage; a stage whose runs differ has a row for each run."""
    packages = sorted({package for source in sources.values() for package in source.versions})
    rows: dict[str, dict[str, list[str]]] = defaultdict(dict)
    for name, source in sources.items():
        versions = [source.versions.get(package, MISSING) for package in packages]
        rows[_stage(name)][name] = [(source.commit or MISSING)[:12], *versions]
    joined = [row for stage, runs in rows.items() for row in _joined(stage, runs)]
    return Table("Commits and versions", ["stage", "commit", *packages], [joined], numeric=False)


def markdown_table(table: Table) -> str:
    """The table in GitHub's Markdown, without its title."""
    rule = ["---", *["---:" if table.numeric else "---"] * (len(table.header) - 1)]
    rows = [table.header, *(row for block in table.blocks for row in block)]
    lines = [[escape_markdown(cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:]))


def escape_markdown(text: str) -> str:
    """The text on one line, with everything escaped that Markdown would read as markup or as a cell's end."""
    return printable(text).translate(_ESCAPES).replace("](", "]\\(")


def _stage(source: str) -> str:
    """The stage of a source, whose name is the stage, or the stage and the reducer."""
    return source.split()[0]


def _joined(stage: str, runs: Mapping[str, list[str]]) -> Iterable[list[str]]:
    """One row for the stage if its runs are alike, else one row for each run."""
    first, *others = runs.values()
    if all(other == first for other in others):
        return [[stage, *first]]
    return [[name, *row] for name, row in runs.items()]


def _percent(value: float | None) -> str:
    return MISSING if value is None else f"{100 * value:.1f}"


def _width(score: ScorePoint | None) -> str:
    """Width of the interval in points."""
    return MISSING if score is None else _percent(score.high - score.low)


def _tokens(score: ScorePoint | None) -> str:
    """Tokens kept, and tokens fed if newlines were fed with them."""
    if score is None:
        return MISSING
    fed = f" ({score.tokens_fed:.1f} fed)" if score.tokens_fed != score.tokens else ""
    return f"{score.tokens:.1f}{fed}"


def _difference(difference: Difference | ScoreChange | None) -> str:
    """In points, with the interval."""
    if difference is None:
        return MISSING
    mean, low, high = (100 * value for value in (difference.mean, difference.low, difference.high))
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def _overlap(overlap: MaskOverlap | None) -> str:
    return MISSING if overlap is None else f"{overlap.mean:.3f} ({overlap.lowest:.2f})"


def _decimals(line: Sequence[float], digits: int) -> list[str]:
    return [f"{value:.{digits}f}" for value in line]


def _keep_header(keeps: Sequence[float]) -> list[str]:
    return ["kept fraction", *(f"{keep:g}" for keep in keeps)]


def _latency_row(entry: SelectionTime, saved: float | None) -> list[str]:
    counts = [str(count) for count in (entry.batch, entry.tokens, entry.kept)]
    gain = [MISSING, MISSING] if saved is None else [f"{saved:.2f}", f"{saved - entry.milliseconds:+.2f}"]
    return [entry.reducer, *counts, f"{entry.milliseconds:.2f}", *gain]


def _change_table(robustness: RobustnessResults, cells: Sequence[str]) -> Table:
    """Score in the reference, and its change under each variant; all tokens first if they were measured."""
    means = [mean for line in robustness.reference.values() for mean in line]
    variants = robustness.variants
    changes = [[variant.name, *map(_difference, _all(variant, "change"))] for variant in variants]
    reference, header = ["reference, %", *map(_percent, means)], ["deployment", *cells]
    if robustness.full is not None:
        reference.insert(1, _percent(robustness.full))
        header.insert(1, "all tokens")
        for row, variant in zip(changes, variants, strict=True):
            row.insert(1, _difference(variant.full))
    return Table("Change of the score in points, with its 95 % interval", header, [[reference], changes])


def _question_overlaps(variant: VariantChanges) -> list[str]:
    overlaps = _all(variant, "iou")
    return [NO_PIXEL_CHANGED if variant.no_pixel_changed else _overlap(overlap) for overlap in overlaps]


def _all(variant: VariantChanges, key: str) -> list[Any]:
    """The values of all reducers at all kept fractions."""
    return [value for changes in variant.reducers.values() for value in getattr(changes, key)]
