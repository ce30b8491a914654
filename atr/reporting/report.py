"""The content of the report, put together once for both of its forms, the Markdown file and the HTML page."""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from PIL import Image

from atr.reporting import cases, figures, headlines, tables
from atr.reporting.cases import Case
from atr.reporting.figures import ImageOf
from atr.reporting.results import Comparison, Masks, Results
from atr.reporting.tables import Table

CURVES_NOTE = (
    "Score against kept fraction; bands are 95 % intervals. "
    "Each curve ends at the score of all tokens, which is what keeping every token gives."
)
SCORES_NOTE = "In %; the intervals are in the figures and in the summary.json of each reducer."
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
class Report:
    """Everything that the pages show."""

    subtitle: str
    headlines: list[str]
    both_groups: Picture
    groups: list[Picture]
    benchmarks: list[Picture]
    pages: list[Picture]
    examples: Picture | None
    examples_note: str
    cards: list[Card]
    agreement: Table
    components: Picture
    scores: list[Table]
    pretraining: Table
    parameters: Table
    provenance: Table

    @property
    def pictures(self) -> list[Picture]:
        """All pictures that lie beside the pages as files."""
        examples = [self.examples] if self.examples else []
        return [self.both_groups, *self.groups, *self.benchmarks, *self.pages, *examples, self.components]


def build(results: Results, image: ImageOf, settings: dict[str, Any], components: bytes) -> Report:
    """Draw and tabulate the results; `settings` is the section `report` of the parameter file.

    `components` is the PNG that the stage extract made with the encoder.
    Raises ValueError when no masks are stored at `page_keep`, or an image is missing.
    """
    answered = cases.answered(results)
    chosen = cases.choose(answered, settings["examples"])
    sources = {"pretrain": results.pretraining} | {
        f"evaluate {name}": vars(evaluation) for name, evaluation in results.evaluations.items()
    }
    parameters = {stage: source["parameters"] for stage, source in sources.items()}
    return Report(
        subtitle=_subtitle(results),
        headlines=headlines.sentences(results),
        both_groups=_curves("groups", results.groups),
        groups=[_curves(f"group-{group.name}", [group]) for group in results.groups],
        benchmarks=[_curves(f"benchmark-{benchmark.name}", [benchmark]) for benchmark in results.benchmarks],
        pages=list(_pages(results, image, settings)),
        examples=_examples(results, chosen, image) if chosen else None,
        examples_note=_examples_note(results) if chosen else NO_EXAMPLES,
        cards=[Card(case, _png(image(case.row.image))) for case in chosen],
        agreement=tables.agreement(results, answered),
        components=_components(results, components),
        scores=[tables.scores(comparison) for comparison in (*results.groups, *results.benchmarks)],
        pretraining=tables.pretraining(results),
        parameters=tables.parameters(parameters | {"report": {"report": settings}}),
        provenance=tables.provenance({stage: source["provenance"] for stage, source in sources.items()}),
    )


def _subtitle(results: Results) -> str:
    full, unanswered = results.evaluations["full"], len(results.unanswered)
    missing = f" {unanswered} of them could not be answered everywhere and are left out there."
    return (
        f"Model {full.vlm} on encoder {full.encoder}: {full.tokens_full:.0f} visual tokens a question, "
        f"{len(full.rows)} held-out questions in {len(results.benchmarks)} benchmarks."
    ) + (missing if unanswered else "")


def _curves(name: str, comparisons: list[Comparison]) -> Picture:
    what = " and ".join(comparison.title for comparison in comparisons)
    return Picture(name, f"{what}: score against kept fraction.", figures.curves(comparisons))


def _pages(results: Results, image: ImageOf, settings: dict[str, Any]) -> Iterator[Picture]:
    """One picture for each benchmark that has masks: the kept patches of its first images (Figure 1)."""
    masks = {name: _masks(results, name, settings["page_keep"]) for name in ("random", "selector")}
    benchmark_of = {row.image: row.benchmark for row in results.evaluations["full"].rows}
    stored = sorted(set.intersection(*(set(mask.kept) for mask in masks.values())) & set(benchmark_of))
    for benchmark in results.benchmarks:
        images = [name for name in stored if benchmark_of[name] == benchmark.name][: settings["pages"]]
        if images:
            caption = (
                f"Held-out images of {benchmark.name}, and their patches kept by random selection and by the "
                f"selector; dropped patches are grey."
            )
            yield Picture(f"pages-{benchmark.name}", caption, figures.pages(images, image, masks))


def _masks(results: Results, reducer: str, keep: float) -> Masks:
    masks = results.evaluations[reducer].masks
    assert masks is not None, f"{reducer} takes a budget and so has masks"
    if masks.keep != keep:
        raise ValueError(f"report.page_keep: {keep} has no masks of reducer {reducer}, allowed: {masks.keep}")
    return masks


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
