"""The parts of the report: figures with captions, tables and example cards."""

import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from atr.reporting import captions, tables
from atr.reporting.dotplots import draw_robustness
from atr.reporting.examples import Case
from atr.reporting.figures import ImageLookup, draw_curves, draw_examples, draw_pages
from atr.reporting.headlines import outcome_sentences
from atr.reporting.heatmaps import draw_differences, draw_overlap
from atr.reporting.intrinsic import IntrinsicResults
from atr.reporting.paired import AdaptiveMatch, PairedDifferences
from atr.reporting.results import Comparison, Masks, Results
from atr.reporting.robustness import RobustnessResults
from atr.reporting.tables import Table


@dataclass(frozen=True)
class Picture:
    """A PNG with the name of its file and its caption."""

    name: str
    caption: str
    png: bytes


@dataclass(frozen=True)
class ExampleCard:
    """One example of Figure 8 with its image as PNG."""

    case: Case
    png: bytes


@dataclass(frozen=True)
class DifferenceSection:
    """The best reducer against each other one, and adaptive against fixed counts if there are any."""

    sentences: list[str]
    pictures: list[Picture]
    tables: list[Table]
    matches: Table | None


@dataclass(frozen=True)
class IntrinsicSection:
    """Quality of the kept tokens without a language model."""

    tables: list[Table]
    overlap: Picture | None


@dataclass(frozen=True)
class RobustnessSection:
    """Changes of masks and scores if the deployment differs from the reference."""

    picture: Picture
    tables: list[Table]


def curve_picture(name: str, comparisons: Sequence[Comparison], best: str) -> Picture:
    """The curves of one or more comparisons side by side."""
    titles = " and ".join(comparison.title for comparison in comparisons)
    caption = f"Score against kept fraction: {titles}."
    return Picture(name, caption, draw_curves(comparisons, best))


def score_tables(results: Results, differences: Sequence[PairedDifferences]) -> list[Table]:
    """Scores and differences of each group and benchmark, then the tokens of each group."""
    shown = []
    for part in differences:
        shown.append(tables.score_table(part.comparison))
        if part.keeps:
            shown.append(tables.difference_table(part))
    return shown + [tables.token_table(group) for group in results.groups]


def difference_section(
    differences: Sequence[PairedDifferences], matches: Sequence[AdaptiveMatch]
) -> DifferenceSection:
    """The differences of the groups that have any, each with a heat map and a table of outcomes."""
    groups = [group for group in differences if group.keeps]
    pictures = [
        Picture(
            f"differences-{group.comparison.name}",
            f"Points by which {group.best} leads each other reducer: {group.comparison.title}.",
            draw_differences(group),
        )
        for group in groups
    ]
    return DifferenceSection(
        sentences=[sentence for group in groups for sentence in outcome_sentences(group)],
        pictures=pictures,
        tables=[tables.outcome_table(group) for group in groups],
        matches=tables.match_table(matches) if matches else None,
    )


def intrinsic_section(intrinsic: IntrinsicResults) -> IntrinsicSection:
    """The measures without a language model; the overlap is left out if no reducer has masks."""
    overlap = intrinsic.overlap
    picture = None
    if overlap:
        picture = Picture(
            "overlap", captions.OVERLAP_CAPTION.format(keep=overlap.keep), draw_overlap(overlap)
        )
    return IntrinsicSection(tables.intrinsic_tables(intrinsic), picture)


def robustness_section(robustness: RobustnessResults, best: str) -> RobustnessSection:
    """The figure and the tables of robustness."""
    picture = Picture("robustness", captions.ROBUSTNESS_CAPTION, draw_robustness(robustness, best))
    return RobustnessSection(picture, tables.robustness_tables(robustness))


def page_pictures(results: Results, image: ImageLookup, settings: dict[str, Any]) -> Iterator[Picture]:
    """The kept patches of the first images of each benchmark that has stored masks (Figure 1)."""
    masks = _stored_masks(results, dict.fromkeys(("random", "selector", settings["best"])))
    if not masks:
        return
    benchmark_of = {row.image: row.benchmark for row in results.evaluations["full"].rows}
    stored = sorted(set.intersection(*(set(mask.kept) for mask in masks.values())) & set(benchmark_of))
    for benchmark in results.benchmarks:
        images = [name for name in stored if benchmark_of[name] == benchmark.name][: settings["pages"]]
        if images:
            caption = captions.PAGES_CAPTION.format(benchmark=benchmark.name, reducers=", ".join(masks))
            yield Picture(f"pages-{file_name(benchmark.name)}", caption, draw_pages(images, image, masks))


def _stored_masks(results: Results, reducers: Iterable[str]) -> dict[str, Masks]:
    masks = {name: results.evaluations[name].masks for name in reducers if name in results.evaluations}
    return {name: stored for name, stored in masks.items() if stored is not None}


def example_picture(results: Results, cases: Sequence[Case], image: ImageLookup) -> Picture | None:
    """The chosen examples in one figure, None if there are none."""
    return Picture("examples", example_note(results, cases), draw_examples(cases, image)) if cases else None


def example_note(results: Results, cases: Sequence[Case]) -> str:
    """How the examples were chosen, or why there are none."""
    if cases:
        return captions.EXAMPLES_NOTE.format(half=f"{results.half:.0%}".replace("%", " %"))
    return captions.NO_EXAMPLES if "random" in results.evaluations else captions.NO_RANDOM


def example_cards(cases: Sequence[Case], image: ImageLookup) -> list[ExampleCard]:
    """The chosen examples one by one."""
    return [ExampleCard(case, _png(image(case.row.image))) for case in cases]


def component_picture(results: Results, png: bytes) -> Picture:
    """The figure that stage extract drew of the encoder's features."""
    caption = captions.COMPONENTS_CAPTION.format(encoder=results.evaluations["full"].encoder)
    return Picture("components", caption, png)


def file_name(benchmark: str) -> str:
    """The benchmark's name as part of a file name: an own benchmark may lie in a folder."""
    return benchmark.replace("/", ".")


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="png")
    return buffer.getvalue()
