"""The few numbers and sentences that say what the experiment showed, computed from the scores."""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from atr.core import catalog
from atr.reporting.intrinsic import Measure
from atr.reporting.paired import LOSS, OUTCOMES, TIE, WIN, Match, Versus
from atr.reporting.results import Comparison, Results

GROUPS = catalog.GROUPS
"""All groups of benchmarks, each a file of DVC's metrics."""


def metrics(results: Results) -> dict[str, dict[str, float]]:
    """Scores of each group at half of the tokens, in 0..1; `relative` is the selector's over full."""
    return {comparison.name: _group(comparison, results.half) for comparison in results.groups}


def scores(results: Results, best: str) -> dict[str, dict[str, float]]:
    """The few numbers of each group that a person follows from one run to the next, for `dvc metrics show`.

    In 0..1: of all tokens; of the best reducer and the selector near .3 and .5; of random near .5. Of a
    group that was not asked there is none.
    """
    names = [(name, keep) for keep in (0.3, 0.5) for name in dict.fromkeys((best, "selector"))]
    found: dict[str, dict[str, float]] = {group: {} for group in GROUPS}
    for comparison in results.groups:
        numbers = found.setdefault(comparison.name, {})
        numbers["full"] = comparison.full.mean
        for name, keep in [*names, ("random", 0.5)]:
            near = results.nearest(keep)
            if (mean := comparison.mean(name, near)) is not None:
                numbers[f"{name}@{f'{near:g}'.removeprefix('0')}"] = mean
    return found


def sentences(results: Results) -> list[str]:
    """One sentence for each group: what the selector holds at half of the tokens, and what random does."""
    return [_sentence(comparison, results.half) for comparison in results.groups]


def verdicts(versus: Versus) -> list[str]:
    """How often the best reducer wins, ties and loses, a sentence for each run of kept fractions alike."""
    return [
        _verdict(versus, counts, list(keeps)) for counts, keeps in groupby(versus.keeps, key=versus.outcomes)
    ]


def verdict(versus: Versus, keep: float) -> str:
    """The same at one kept fraction."""
    return _verdict(versus, versus.outcomes(keep), [keep])


def numbers(
    results: Results, compared: Sequence[Versus], found: Sequence[Match], measure: Measure | None
) -> dict[str, Any]:
    """All that was found, nested, in 0..1; without times, so that equal results give equal numbers.

    Under `differences` and `measure` by kept fraction, under `adaptive` by group or benchmark.
    """
    keeps = sorted({keep for versus in compared for keep in versus.keeps})
    by_keep = {
        f"{keep:g}": {versus.comparison.name: _differences(versus, keep) for versus in compared}
        for keep in keeps
    }
    content: dict[str, Any] = {**metrics(results), "differences": by_keep}
    for match in found:
        if match.difference:
            part = content.setdefault("adaptive", {}).setdefault(match.comparison.name, {})
            level = {"kept": match.score.keep, "adaptive": match.score.mean, "fixed": match.fixed}
            part[match.adaptive] = level | {"difference": vars(match.difference)}
    if measure:
        keeps = sorted({*measure.keep, *(measure.stability.keep if measure.stability else ())})
        content["measure"] = {f"{keep:g}": dict(_measured(measure, keep)) for keep in keeps}
        names = measure.overlap.names
        content["overlap"] = {
            name: dict(zip(names, line, strict=True))
            for name, line in zip(names, measure.overlap.iou, strict=True)
        }
    return content


def relative(score: float, full: float) -> float:
    """A score as a fraction of the full one; of a full score of zero, everything is held."""
    return score / full if full else 1.0


def _group(comparison: Comparison, keep: float) -> dict[str, float]:
    means = {name: score.mean for name in comparison.curves if (score := comparison.at(name, keep))}
    numbers = {"full": comparison.full.mean}
    if comparison.none:
        numbers["none"] = comparison.none.mean
    numbers |= {f"{name}@{keep:g}": mean for name, mean in means.items()}
    numbers[f"relative@{keep:g}"] = relative(means["selector"], comparison.full.mean)
    if "random" in means:
        numbers[f"difference@{keep:g}"] = means["selector"] - means["random"]
    return numbers


def _sentence(comparison: Comparison, keep: float) -> str:
    selector = comparison.at("selector", keep)
    assert selector is not None, f"{comparison.name}: {keep} is not shared"
    held = relative(selector.mean, comparison.full.mean)
    newlines = selector.tokens_fed != selector.tokens
    fed = f", {selector.tokens_fed:g} fed with newlines" if newlines else ""
    scores = f"{selector.mean:.1%} of {comparison.full.mean:.1%}"
    sentence = (
        f"On the {comparison.title}, with {keep:.0%} of the visual tokens kept "
        f"({selector.tokens:g} a question{fed}), the selector holds {held:.1%} of the full score ({scores})"
    )
    if (random := comparison.mean("random", keep)) is not None:
        points = 100 * (selector.mean - random)
        side = "above" if points >= 0 else "below"
        sentence += f" and is {abs(points):.1f} points {side} random selection ({random:.1%})"
    return f"{sentence}.".replace("%", "\N{NO-BREAK SPACE}%")


def _verdict(versus: Versus, counts: Counter[str], keeps: list[float]) -> str:
    others = counts.total()
    run = f"{keeps[0]:g}" if len(keeps) == 1 else f"{keeps[0]:g} to {keeps[-1]:g}"
    return (
        f"On the {versus.comparison.title}, {versus.best} wins against {counts[WIN]} of {others} other "
        f"reducer{'s' * (others != 1)} at {run}, ties with {counts[TIE]} and loses to {counts[LOSS]}."
    )


def _differences(versus: Versus, keep: float) -> dict[str, Any]:
    lines = {f"{versus.best} minus {name}": line.get(keep) for name, line in versus.others.items()}
    counts = versus.outcomes(keep)
    return {outcome: counts[outcome] for outcome in OUTCOMES} | {
        name: vars(difference) for name, difference in lines.items() if difference
    }


def _measured(measure: Measure, keep: float) -> Iterator[tuple[str, Any]]:
    """What was measured at one kept fraction: for each reducer, and of the selector's training."""
    if keep in measure.keep:
        place = measure.keep.index(keep)
        for name, selection in measure.reducers.items():
            yield name, {key: line[place] for key, line in vars(selection).items() if line is not None}
    if measure.stability and keep in measure.stability.keep:
        yield "stability", measure.stability.iou[measure.stability.keep.index(keep)]
