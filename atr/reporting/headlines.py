"""The main results as a few numbers and sentences."""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from atr.core.catalog import GROUPS
from atr.reporting.intrinsic import IntrinsicResults
from atr.reporting.paired import LOSS, OUTCOMES, TIE, WIN, AdaptiveMatch, PairedDifferences
from atr.reporting.results import Comparison, Results


def group_scores(results: Results) -> dict[str, dict[str, float]]:
    """Scores of each group at half of the tokens, in 0..1; `relative` is selector over full."""
    return {comparison.name: _group_scores(comparison, results.half) for comparison in results.groups}


def headline_scores(results: Results, best: str) -> dict[str, dict[str, float]]:
    """The few scores of each group to follow from run to run, for `dvc metrics show`; in 0..1.

    They are those of all tokens, of the best reducer and the selector near 0.3 and 0.5, and of random near
    0.5. A group without results is empty.
    """
    cells = [(name, keep) for keep in (0.3, 0.5) for name in dict.fromkeys((best, "selector"))]
    scores: dict[str, dict[str, float]] = {group: {} for group in GROUPS}
    for comparison in results.groups:
        group = scores.setdefault(comparison.name, {})
        group["full"] = comparison.full.mean
        for name, keep in [*cells, ("random", 0.5)]:
            near = results.nearest(keep)
            if (mean := comparison.mean(name, near)) is not None:
                group[f"{name}@{f'{near:g}'.removeprefix('0')}"] = mean
    return scores


def subtitle(results: Results) -> str:
    """Model, encoder, numbers of tokens and questions, and how the answers were computed."""
    full, unanswered = results.evaluations["full"], len(results.unanswered)
    sentence = (
        f"Model {full.vlm} on encoder {full.encoder}: {full.tokens_full:.0f} visual tokens per question, "
        f"{len(full.rows)} held-out questions in {len(results.benchmarks)} benchmarks."
    )
    if unanswered:
        sentence += f" {unanswered} of them could not be answered by every reducer and are left out there."
    return f"{sentence} {_computed_in(results)}"


def selector_sentences(results: Results) -> list[str]:
    """For each group, the selector's score at half of the tokens against all tokens and random."""
    return [_selector_sentence(comparison, results.half) for comparison in results.groups]


def outcome_sentences(differences: PairedDifferences) -> list[str]:
    """Wins, ties and losses of the best reducer; adjacent kept fractions with equal counts are joined."""
    runs = groupby(differences.keeps, key=differences.outcomes)
    return [_outcome_sentence(differences, counts, list(keeps)) for counts, keeps in runs]


def outcome_sentence(differences: PairedDifferences, keep: float) -> str:
    """Wins, ties and losses of the best reducer at one kept fraction."""
    return _outcome_sentence(differences, differences.outcomes(keep), [keep])


def all_numbers(
    results: Results,
    differences: Sequence[PairedDifferences],
    matches: Sequence[AdaptiveMatch],
    intrinsic: IntrinsicResults | None,
) -> dict[str, Any]:
    """All results as one nested dict, in 0..1; without times, so that equal results give equal numbers.

    `differences` and `intrinsic` are by kept fraction, `adaptive` by group or benchmark.
    """
    numbers: dict[str, Any] = {**group_scores(results), "differences": _difference_numbers(differences)}
    if adaptive := _match_numbers(matches):
        numbers["adaptive"] = adaptive
    if intrinsic:
        numbers["intrinsic"] = _intrinsic_numbers(intrinsic)
        if overlap := intrinsic.overlap:
            numbers["overlap"] = {
                name: dict(zip(overlap.names, line, strict=True))
                for name, line in zip(overlap.names, overlap.iou, strict=True)
            }
    return numbers


def relative(score: float, full: float) -> float:
    """A score as a fraction of the full score; 1 if the full score is zero."""
    return score / full if full else 1.0


def _computed_in(results: Results) -> str:
    """Precision, attention kernel and inputs, shared by all reducers, and the machines, which may differ."""
    machines: dict[str, list[str]] = {}
    for name, evaluation in results.evaluations.items():
        machine = f"{evaluation.resolved['device']} ({evaluation.resolved['processor']})"
        machines.setdefault(machine, []).append(name)
    place = next(iter(machines))
    if len(machines) > 1:
        place = "several machines, " + "; ".join(
            f"{key}: {', '.join(names)}" for key, names in machines.items()
        )
    shared = results.evaluations["full"].resolved
    stored = shared["features"]
    source = "the images" if stored is None else f"features in {stored['precision']} on {stored['device']}"
    return (
        f"Answered in {shared['precision']} with {shared['attention']} attention on {place}, from {source}."
    )


def _group_scores(comparison: Comparison, keep: float) -> dict[str, float]:
    means = {name: score.mean for name in comparison.curves if (score := comparison.at(name, keep))}
    scores = {"full": comparison.full.mean}
    if comparison.none:
        scores["none"] = comparison.none.mean
    scores |= {f"{name}@{keep:g}": mean for name, mean in means.items()}
    scores[f"relative@{keep:g}"] = relative(means["selector"], comparison.full.mean)
    if "random" in means:
        scores[f"difference@{keep:g}"] = means["selector"] - means["random"]
    return scores


def _selector_sentence(comparison: Comparison, keep: float) -> str:
    selector = comparison.at("selector", keep)
    assert selector is not None, f"{comparison.name}: {keep} is not shared"
    held = relative(selector.mean, comparison.full.mean)
    newlines = selector.tokens_fed != selector.tokens
    fed = f", {selector.tokens_fed:g} fed with newlines" if newlines else ""
    sentence = (
        f"On the {comparison.title}, with {keep:.0%} of the visual tokens kept "
        f"({selector.tokens:g} per question{fed}), the selector retains {held:.1%} of the full score "
        f"({selector.mean:.1%} of {comparison.full.mean:.1%})"
    )
    if (random := comparison.mean("random", keep)) is not None:
        points = 100 * (selector.mean - random)
        side = "above" if points >= 0 else "below"
        sentence += f" and is {abs(points):.1f} points {side} random selection ({random:.1%})"
    return f"{sentence}.".replace("%", "\N{NO-BREAK SPACE}%")


def _outcome_sentence(differences: PairedDifferences, counts: Counter[str], keeps: list[float]) -> str:
    others = counts.total()
    run = f"{keeps[0]:g}" if len(keeps) == 1 else f"{keeps[0]:g} to {keeps[-1]:g}"
    return (
        f"On the {differences.comparison.title}, at kept fraction {run}, {differences.best} wins against "
        f"{counts[WIN]} of {others} other reducer{'s' * (others != 1)}, ties with {counts[TIE]} and loses to "
        f"{counts[LOSS]}."
    )


def _difference_numbers(differences: Sequence[PairedDifferences]) -> dict[str, Any]:
    keeps = sorted({keep for part in differences for keep in part.keeps})
    return {
        f"{keep:g}": {part.comparison.name: _differences_at(part, keep) for part in differences}
        for keep in keeps
    }


def _differences_at(differences: PairedDifferences, keep: float) -> dict[str, Any]:
    lines = {f"{differences.best} minus {name}": line.get(keep) for name, line in differences.others.items()}
    counts = differences.outcomes(keep)
    return {outcome: counts[outcome] for outcome in OUTCOMES} | {
        name: vars(difference) for name, difference in lines.items() if difference
    }


def _match_numbers(matches: Sequence[AdaptiveMatch]) -> dict[str, Any]:
    numbers: dict[str, Any] = {}
    for match in matches:
        if match.difference:
            levels = {"kept": match.score.keep, "adaptive": match.score.mean, "fixed": match.fixed}
            part = numbers.setdefault(match.comparison.name, {})
            part[match.adaptive] = levels | {"difference": vars(match.difference)}
    return numbers


def _intrinsic_numbers(intrinsic: IntrinsicResults) -> dict[str, Any]:
    keeps = sorted({*intrinsic.keep, *(intrinsic.stability.keep if intrinsic.stability else ())})
    return {f"{keep:g}": dict(_intrinsic_at(intrinsic, keep)) for keep in keeps}


def _intrinsic_at(intrinsic: IntrinsicResults, keep: float) -> Iterator[tuple[str, Any]]:
    """The measures of each reducer at one kept fraction, and the stability of the selector's training."""
    if keep in intrinsic.keep:
        place = intrinsic.keep.index(keep)
        for name, curves in intrinsic.reducers.items():
            yield name, {key: line[place] for key, line in vars(curves).items() if line is not None}
    if intrinsic.stability and keep in intrinsic.stability.keep:
        yield "stability", intrinsic.stability.iou[intrinsic.stability.keep.index(keep)]
