"""The content of the report, put together once for both of its forms, the Markdown file and the HTML page."""

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from PIL import Image

from atr.reporting import examples, figures, headlines, heatmaps, robustness, tables
from atr.reporting.examples import Case
from atr.reporting.figures import ImageOf
from atr.reporting.intrinsic import Cost, Measure
from atr.reporting.paired import Match, Versus, matches, versus
from atr.reporting.results import Comparison, Masks, Results
from atr.reporting.robustness import Robustness
from atr.reporting.tables import Table

CURVES_NOTE = (
    "Score against kept fraction; bands, of the thick lines, are 95 % intervals. A star is a reducer that "
    "chooses its count, at the mean fraction it keeps. "
    "Each curve ends at the score of all tokens, which is what keeping every token gives. Inside the "
    "language model (fastv, pyramiddrop) the kept fraction is a mean over its layers, of which the "
    "first read all."
)
SCORES_NOTE = (
    "In %, differences in points with their paired 95 % intervals; the intervals of the scores are in the "
    "figures and in the summary.json of each reducer. Tokens are means of a question, weighed as its score "
    "is; those fed to the language model include the newlines at the ends of an image's rows, which do not "
    "count as kept. Inside the language model both are means over its layers."
)
DIFFERENCES_NOTE = (
    "Differences are of the same questions, their 95 % intervals a paired bootstrap over them within each "
    "benchmark. A win is an interval wholly above zero (▲), a loss one wholly below (▼), and anything else a "
    "tie (=). The pictures show points, the strongest of the others on top."
)
MATCHES_NOTE = (
    "A count that the reducer chooses image by image, against the same reducer with one fixed fraction: its "
    "score between the two nearest budgets, in proportion to the tokens, at equal mean tokens of a question."
)
MEASURE_NOTE = (
    "The same tokens without a language model: the variance of the features that a reconstructor does not "
    "restore from them, the one trained with the selector and one trained on random masks; the text they "
    "cover; and the overlap (IoU, in %) of what each two reducers keep."
)
COST_NOTE = (
    "Medians. Selection is the time to choose the tokens, with the attention a method needs; the prefill "
    "saved is that of all tokens less that of the kept ones, and net is what remains of it."
)
NO_RANDOM = "Examples are questions on which the selector and random differ, and random was not evaluated."
NO_EXAMPLES = "There is no question that all tokens answer rightly and only one of selector and random does."


@dataclass(frozen=True)
class Picture:
    """A PNG with the name of its file and the text under it."""

    name: str
    caption: str
    png: bytes


@dataclass(frozen=True)
class Card:
    """One case of Figure 8 with its image as PNG."""

    case: Case
    png: bytes


@dataclass(frozen=True)
class Compared:
    """The best reducer against each other one, and adaptive counts against fixed ones if there are any."""

    verdicts: list[str]
    pictures: list[Picture]
    tables: list[Table]
    matches: Table | None


@dataclass(frozen=True)
class Measured:
    """What the kept tokens are without a language model."""

    tables: list[Table]
    overlap: Picture


@dataclass(frozen=True)
class Robust:
    """What changes where deployment differs from training."""

    picture: Picture
    tables: list[Table]


@dataclass(frozen=True)
class Report:
    """Everything that the pages show."""

    subtitle: str
    headlines: list[str]
    both_groups: Picture
    groups: list[Picture]
    compared: Compared
    benchmarks: list[Picture]
    pages: list[Picture]
    examples: Picture | None
    examples_note: str
    cards: list[Card]
    agreement: Table | None
    components: Picture
    scores: list[Table]
    measured: Measured | None
    cost: Table | None
    robust: Robust | None
    pretraining: Table
    parameters: Table
    provenance: Table
    numbers: dict[str, Any]
    """All that was found, for programs to read: no times, so equal results give equal numbers."""
    metrics: dict[str, dict[str, float]]
    """A few of them by group, for `dvc metrics show`."""

    @property
    def pictures(self) -> list[Picture]:
        """All pictures that lie beside the pages as files."""
        groups = [self.both_groups, *self.groups, *self.compared.pictures]
        rest = [self.examples, self.components, self.measured.overlap if self.measured else None]
        rest += [self.robust.picture] if self.robust else []
        return [*groups, *self.benchmarks, *self.pages, *(picture for picture in rest if picture)]


def build(
    results: Results,
    image: ImageOf,
    settings: dict[str, Any],
    components: bytes,
    measure: Measure | None = None,
    cost: Cost | None = None,
    robust: Robustness | None = None,
) -> Report:
    """Draw and tabulate the results; `settings` is the section `report` of the parameter file.

    `components` is the PNG that the stage extract made with the encoder.
    Raises ValueError when `best` was not evaluated, or an image is missing. What needs a
    reducer that was not evaluated, random or none, is left out.
    """
    answered = examples.answered(results)
    chosen = examples.choose(answered, settings["examples"])
    best = settings["best"]
    compared, found = versus(results, best), matches(results)
    groups = compared[: len(results.groups)]
    sources = _sources(results, measure, cost, robust)
    parameters = {
        stage: source["parameters"] | {"resolved": source["resolved"]} for stage, source in sources.items()
    }
    return Report(
        subtitle=_subtitle(results),
        headlines=_headlines(results, groups),
        both_groups=_curves("groups", results.groups, best),
        groups=[_curves(f"group-{group.name}", [group], best) for group in results.groups],
        compared=_compared([each for each in groups if each.keeps], found),
        benchmarks=[
            _curves(f"benchmark-{benchmark.name}", [benchmark], best) for benchmark in results.benchmarks
        ],
        pages=list(_pages(results, image, settings)),
        examples=_examples(results, chosen, image) if chosen else None,
        examples_note=_examples_note(results) if chosen else _why_none(results),
        cards=[Card(case, _png(image(case.row.image))) for case in chosen],
        agreement=tables.agreement(results, answered) if "random" in results.evaluations else None,
        components=_components(results, components),
        scores=_scores(results, compared),
        measured=_measured(measure) if measure else None,
        cost=tables.cost(cost) if cost else None,
        robust=_robust(robust, best) if robust else None,
        pretraining=tables.pretraining(results),
        parameters=tables.parameters(parameters | {"report": {"report": settings}}),
        provenance=tables.provenance({stage: source["provenance"] for stage, source in sources.items()}),
        numbers=headlines.numbers(results, compared, found, measure),
        metrics=headlines.scores(results, best),
    )


def _headlines(results: Results, groups: list[Versus]) -> list[str]:
    verdicts = [headlines.verdict(each, results.half) for each in groups if results.half in each.keeps]
    return headlines.sentences(results) + verdicts


def _scores(results: Results, compared: list[Versus]) -> list[Table]:
    """Scores of each group and benchmark, with differences where there are any, then tokens of the groups."""
    found = []
    for each in compared:
        found += [tables.scores(each.comparison), *([tables.differences(each)] if each.keeps else [])]
    return found + [tables.tokens(group) for group in results.groups]


def _sources(
    results: Results, measure: Measure | None, cost: Cost | None, robust: Robustness | None
) -> dict[str, dict[str, Any]]:
    """What each stage left, by its name."""
    evaluations = {f"evaluate {name}": vars(each) for name, each in results.evaluations.items()}
    optional = {"measure": measure, "cost": cost, "robustness": robust}
    return (
        {"pretrain": results.pretraining}
        | evaluations
        | {stage: vars(found) for stage, found in optional.items() if found}
    )


def _compared(groups: list[Versus], found: list[Match]) -> Compared:
    pictures = [
        Picture(
            f"differences-{each.comparison.name}",
            f"{each.comparison.title}: {each.best} minus each other reducer, in points.",
            heatmaps.differences(each),
        )
        for each in groups
    ]
    return Compared(
        verdicts=[sentence for each in groups for sentence in headlines.verdicts(each)],
        pictures=pictures,
        tables=[tables.outcomes(each) for each in groups],
        matches=tables.matches(found) if found else None,
    )


def _measured(measure: Measure) -> Measured:
    caption = f"Overlap (IoU, in %) of the tokens that each two reducers keep at {measure.overlap.keep:g}."
    every = [tables.reconstruction(measure), tables.coverage(measure), tables.stability(measure)]
    picture = Picture("overlap", caption, heatmaps.overlap(measure.overlap))
    return Measured([table for table in every if table], picture)


def _robust(found: Robustness, best: str) -> Robust:
    caption = (
        "Overlap with the reference's tokens, and points of score with paired 95 % intervals. Where no pixel "
        "of the questions' images changes, hollow marks are the overlap on photographs."
    )
    picture = Picture("robustness", caption, robustness.figure(found, best))
    return Robust(picture, robustness.tables(found))


def _subtitle(results: Results) -> str:
    full, unanswered = results.evaluations["full"], len(results.unanswered)
    missing = f" {unanswered} of them could not be answered everywhere and are left out there."
    asked = (
        f"Model {full.vlm} on encoder {full.encoder}: {full.tokens_full:.0f} visual tokens a question, "
        f"{len(full.rows)} held-out questions in {len(results.benchmarks)} benchmarks."
    )
    return asked + (missing if unanswered else "") + _computed(results)


def _computed(results: Results) -> str:
    """What the answers were computed in, which all reducers share but for the machine."""
    machines: dict[str, list[str]] = {}
    for name, each in results.evaluations.items():
        machine = f"{each.resolved['device']} ({each.resolved['processor']})"
        machines.setdefault(machine, []).append(name)
    where = "; ".join(f"{place}: {', '.join(names)}" for place, names in machines.items())
    place = next(iter(machines)) if len(machines) == 1 else f"several machines, {where}"
    shared = results.evaluations["full"].resolved
    stored = shared["features"]
    source = "the images" if stored is None else f"features in {stored['precision']} on {stored['device']}"
    return f" Answered in {shared['precision']} by {shared['attention']} attention on {place}, from {source}."


def _curves(name: str, comparisons: list[Comparison], best: str) -> Picture:
    what = " and ".join(comparison.title for comparison in comparisons)
    return Picture(name, f"{what}: score against kept fraction.", figures.curves(comparisons, best))


def _pages(results: Results, image: ImageOf, settings: dict[str, Any]) -> Iterator[Picture]:
    """One picture for each benchmark that has masks: the kept patches of its first images (Figure 1)."""
    masks = _masks(results, dict.fromkeys(("random", "selector", settings["best"])))
    if not masks:
        return
    benchmark_of = {row.image: row.benchmark for row in results.evaluations["full"].rows}
    stored = sorted(set.intersection(*(set(mask.kept) for mask in masks.values())) & set(benchmark_of))
    for benchmark in results.benchmarks:
        images = [name for name in stored if benchmark_of[name] == benchmark.name][: settings["pages"]]
        if images:
            caption = (
                f"Held-out images of {benchmark.name}, and the patches kept by {', '.join(masks)}; "
                f"dropped patches are grey."
            )
            yield Picture(f"pages-{benchmark.name}", caption, figures.pages(images, image, masks))


def _masks(results: Results, reducers: Iterable[str]) -> dict[str, Masks]:
    """Those that are stored: what merges tokens keeps none."""
    found = {name: results.evaluations[name].masks for name in reducers if name in results.evaluations}
    return {name: masks for name, masks in found.items() if masks is not None}


def _examples(results: Results, chosen: list[Case], image: ImageOf) -> Picture:
    return Picture("examples", _examples_note(results), figures.examples(chosen, image))


def _examples_note(results: Results) -> str:
    """How the examples were chosen, in words: they are not the prettiest, and they say so."""
    half = f"{results.half:.0%}".replace("%", " %")
    return (
        f"Answers with all tokens, and with {half} of them kept by random selection (its first seed) and "
        "by the selector. Shown are the first questions of each benchmark in turn that all tokens answer "
        "rightly and exactly one of the two does; cases that random wins are among them wherever there "
        "are any."
    )


def _why_none(results: Results) -> str:
    return NO_EXAMPLES if "random" in results.evaluations else NO_RANDOM


def _components(results: Results, png: bytes) -> Picture:
    encoder = results.evaluations["full"].encoder
    caption = (
        "Two photographs, and beside each the first three principal components of the features that encoder "
        f"{encoder} gives its patches, as red, green and blue."
    )
    return Picture("components", caption, png)


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="png")
    return buffer.getvalue()
