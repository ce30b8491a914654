"""The few numbers and sentences that say what the experiment showed, computed from the scores."""

from atr.reporting.results import Comparison, Results


def metrics(results: Results) -> dict[str, dict[str, float]]:
    """Scores of each group at half of the tokens, in 0..1; `relative` is the selector's over full."""
    return {comparison.name: _group(comparison, results.half) for comparison in results.groups}


def sentences(results: Results) -> list[str]:
    """One sentence for each group: what the selector holds at half of the tokens, and what random does."""
    return [_sentence(comparison, results.half) for comparison in results.groups]


def relative(score: float, full: float) -> float:
    """A score as a fraction of the full one; of a full score of zero, everything is held."""
    return score / full if full else 1.0


def _group(comparison: Comparison, keep: float) -> dict[str, float]:
    means = {name: score.mean for name in comparison.curves if (score := comparison.at(name, keep))}
    return {
        "full": comparison.full.mean,
        "none": comparison.none.mean,
        **{f"{name}@{keep:g}": mean for name, mean in means.items()},
        f"relative@{keep:g}": relative(means["selector"], comparison.full.mean),
        f"difference@{keep:g}": means["selector"] - means["random"],
    }


def _sentence(comparison: Comparison, keep: float) -> str:
    selector, random = comparison.at("selector", keep), comparison.at("random", keep)
    assert selector is not None and random is not None, f"{comparison.name}: {keep} is not shared"
    held = relative(selector.mean, comparison.full.mean)
    points = 100 * (selector.mean - random.mean)
    side = "above" if points >= 0 else "below"
    scores = f"{selector.mean:.1%} of {comparison.full.mean:.1%}"
    return (
        f"On the {comparison.title}, with {keep:.0%} of the visual tokens kept "
        f"({selector.tokens:g} an image), "
        f"the selector holds {held:.1%} of the full score ({scores}) "
        f"and is {abs(points):.1f} points {side} random selection ({random.mean:.1%})."
    ).replace("%", "\N{NO-BREAK SPACE}%")
