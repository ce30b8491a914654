"""The content of the report, for both of its forms: the Markdown file and the HTML page."""

from dataclasses import dataclass
from typing import Any

from atr.reporting import headlines, sections, tables
from atr.reporting.cells import Sourced
from atr.reporting.examples import choose_cases, find_cases
from atr.reporting.figures import ImageLookup
from atr.reporting.intrinsic import IntrinsicResults
from atr.reporting.latency import LatencyResults
from atr.reporting.paired import PairedDifferences, match_adaptive, paired_differences
from atr.reporting.results import Results
from atr.reporting.robustness import RobustnessResults
from atr.reporting.sections import (
    DifferenceSection,
    ExampleCard,
    IntrinsicSection,
    Picture,
    RobustnessSection,
)
from atr.reporting.tables import Table


@dataclass(frozen=True)
class Measurements:
    """Results of the stages other than evaluate; None for a stage without results."""

    intrinsic: IntrinsicResults | None = None
    latency: LatencyResults | None = None
    robustness: RobustnessResults | None = None

    @property
    def sources(self) -> dict[str, Sourced]:
        """The files by stage and reducer."""
        sources: dict[str, Sourced] = {}
        if self.intrinsic:
            sources |= {f"intrinsic {name}": cell for name, cell in self.intrinsic.cells.items()}
        if self.latency:
            sources |= self.latency.sources
        if self.robustness:
            sources |= {f"robustness {name}": cell for name, cell in self.robustness.cells.items()}
        return sources


@dataclass(frozen=True)
class ReportContent:
    """Everything on the pages, and the numbers for programs."""

    subtitle: str
    headlines: list[str]
    both_groups: Picture
    groups: list[Picture]
    differences: DifferenceSection
    benchmarks: list[Picture]
    pages: list[Picture]
    examples: Picture | None
    examples_note: str
    cards: list[ExampleCard]
    agreement: Table | None
    scores: list[Table]
    intrinsic: IntrinsicSection | None
    latency: Table | None
    robustness: RobustnessSection | None
    components: Picture
    pretraining: Table
    provenance: Table
    parameters: Table
    numbers: dict[str, Any]
    """All results; no times, so that equal results give equal numbers."""
    metrics: dict[str, dict[str, float]]
    """A few of the numbers by group, for `dvc metrics show`."""

    @property
    def pictures(self) -> list[Picture]:
        """All pictures, which are also files beside the pages."""
        groups = [self.both_groups, *self.groups, *self.differences.pictures]
        rest = [self.examples, self.components]
        rest += [self.intrinsic.overlap] if self.intrinsic else []
        rest += [self.robustness.picture] if self.robustness else []
        return [*groups, *self.benchmarks, *self.pages, *(picture for picture in rest if picture)]


def build_report(
    results: Results,
    image: ImageLookup,
    settings: dict[str, Any],
    components: bytes,
    measured: Measurements = Measurements(),
) -> ReportContent:
    """Draw and tabulate the results; `settings` is the section `report` of the parameter file.

    `components` is the PNG that stage extract drew of the encoder's features. Parts that need the reducers
    random or none are left out if these were not evaluated. Raises ValueError if `report.best` was not
    evaluated, or if an image is missing.
    """
    best = settings["best"]
    differences, matches = paired_differences(results, best), match_adaptive(results)
    groups = differences[: len(results.groups)]
    cases = find_cases(results)
    chosen = choose_cases(cases, settings["examples"])
    intrinsic, latency, robustness = measured.intrinsic, measured.latency, measured.robustness
    return ReportContent(
        subtitle=headlines.subtitle(results),
        headlines=_headlines(results, groups),
        both_groups=sections.curve_picture("groups", results.groups, best),
        groups=_curve_pictures("group", results, best),
        differences=sections.difference_section(groups, matches),
        benchmarks=_curve_pictures("benchmark", results, best),
        pages=list(sections.page_pictures(results, image, settings)),
        examples=sections.example_picture(results, chosen, image),
        examples_note=sections.example_note(results, chosen),
        cards=sections.example_cards(chosen, image),
        agreement=tables.agreement_table(results, cases) if "random" in results.evaluations else None,
        scores=sections.score_tables(results, differences),
        intrinsic=sections.intrinsic_section(intrinsic) if intrinsic else None,
        latency=tables.latency_table(latency) if latency else None,
        robustness=sections.robustness_section(robustness, best) if robustness else None,
        components=sections.component_picture(results, components),
        pretraining=tables.pretraining_table(results.pretraining),
        **_source_tables(results, measured, settings),
        numbers=headlines.all_numbers(results, differences, matches, intrinsic),
        metrics=headlines.headline_scores(results, best),
    )


def _headlines(results: Results, groups: list[PairedDifferences]) -> list[str]:
    half = results.half
    outcomes = [headlines.outcome_sentence(group, half) for group in groups if half in group.keeps]
    return headlines.selector_sentences(results) + outcomes


def _curve_pictures(kind: str, results: Results, best: str) -> list[Picture]:
    comparisons = results.groups if kind == "group" else results.benchmarks
    return [
        sections.curve_picture(f"{kind}-{sections.file_name(comparison.name)}", [comparison], best)
        for comparison in comparisons
    ]


def _source_tables(results: Results, measured: Measurements, settings: dict[str, Any]) -> dict[str, Table]:
    """Parameters and provenance of every stage with results."""
    sources: dict[str, Sourced] = {"pretrain": results.pretraining}
    sources |= {f"evaluate {name}": evaluation for name, evaluation in results.evaluations.items()}
    sources |= measured.sources
    parameters = {
        name: {**source.parameters, "resolved": source.resolved} for name, source in sources.items()
    }
    return {
        "parameters": tables.parameter_table(parameters | {"report": {"report": settings}}),
        "provenance": tables.provenance_table({name: source.provenance for name, source in sources.items()}),
    }
