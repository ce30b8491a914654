from dataclasses import replace

import pytest

from atr.reporting import headlines
from atr.reporting.intrinsic import IntrinsicCurves, IntrinsicResults, OverlapMatrix, Stability
from atr.reporting.paired import AdaptiveMatch, Difference, PairedDifferences
from atr.reporting.results import Comparison, Results, ScorePoint


def score(keep, mean):
    return ScorePoint(keep=keep, tokens=144 * keep, tokens_fed=144 * keep, mean=mean, low=mean, high=mean)


def group(name, selector, random, full=0.8):
    curves = {"selector": (score(0.5, selector),), "random": (score(0.5, random),)}
    return Comparison("group", name, full=score(1.0, full), none=score(0.0, 0.1), curves=curves)


class Two(Results):
    """Two groups and nothing else."""

    groups = (group("text", 0.76, 0.3), group("general", 0.7, 0.725))
    benchmarks = ()


@pytest.fixture
def two():
    return Two({"selector": None, "random": None}, {})


def test_metrics_are_the_scores_and_what_follows_from_them(two):
    assert headlines.group_scores(two)["text"] == {
        "full": 0.8,
        "none": 0.1,
        "selector@0.5": 0.76,
        "random@0.5": 0.3,
        "relative@0.5": pytest.approx(0.95),
        "difference@0.5": pytest.approx(0.46),
    }


def test_the_headline_scores_are_few(two):
    curves = {
        name: tuple(score(keep, level + keep / 10) for keep in (0.3, 0.5))
        for name, level in (("selector", 0.6), ("random", 0.2), ("distilled", 0.7), ("dart", 0.5))
    }
    object.__setattr__(two, "evaluations", dict.fromkeys(curves))
    object.__setattr__(two, "groups", tuple(replace(each, curves=curves) for each in two.groups))
    scores = headlines.headline_scores(two, "distilled")
    assert list(scores) == ["text", "general"]
    assert scores["text"] == pytest.approx(
        {
            "full": 0.8, "distilled@.3": 0.73, "selector@.3": 0.63, "distilled@.5": 0.75,
            "selector@.5": 0.65, "random@.5": 0.25,
        }
    )  # fmt: skip


def test_a_group_without_results_has_no_scores_and_random_none_if_it_was_not_evaluated():
    class One(Results):
        groups = (replace(group("text", 0.6, 0.2), curves={"selector": (score(0.4, 0.6),)}),)
        benchmarks = ()

    scores = headlines.headline_scores(One({"selector": None}, {}), "selector")
    assert scores == {"text": {"full": 0.8, "selector@.4": 0.6}, "general": {}}


def test_sentences_say_above_and_below(two):
    text, general = (
        sentence.replace("\N{NO-BREAK SPACE}", " ") for sentence in headlines.selector_sentences(two)
    )
    assert text.startswith("On the text group, with 50 % of the visual tokens kept (72 per question), the ")
    assert "selector retains 95.0 % of the full score (76.0 % of 80.0 %) and is 46.0 points above " in text
    assert text.endswith("above random selection (30.0 %).")
    assert "retains 87.5 % of the full score (70.0 % of 80.0 %) and is 2.5 points below" in general


def test_sentences_join_neighbouring_fractions_with_equal_counts(two):
    up, level, down = (Difference(mean, mean - 0.1, mean + 0.1) for mean in (0.2, 0.0, -0.2))
    others = {
        "random": {0.1: up, 0.2: up, 0.3: up, 0.5: up},
        "mmr": {0.1: level, 0.2: level, 0.3: down},
        "dart": {0.1: up, 0.2: up, 0.3: down},
    }
    differences = PairedDifferences(two.groups[0], "selector", others)
    assert headlines.outcome_sentences(differences) == [
        "On the text group, at kept fraction 0.1 to 0.2, selector wins against 2 of 3 other reducers, ties "
        "with 1 and loses to 0.",
        "On the text group, at kept fraction 0.3, selector wins against 1 of 3 other reducers, ties with 0 "
        "and loses to 2.",
        "On the text group, at kept fraction 0.5, selector wins against 1 of 1 other reducer, ties with 0 "
        "and loses to 0.",
    ]
    assert headlines.outcome_sentence(differences, 0.3) == headlines.outcome_sentences(differences)[1]


def test_numbers_hold_every_difference_by_kept_fraction(two):
    one, other = Difference(0.2, 0.1, 0.3), Difference(0.0, -0.1, 0.1)
    differences = PairedDifferences(
        two.groups[0], "selector", {"random": {0.3: one, 0.5: other}, "mmr": {0.5: one}}
    )
    numbers = headlines.all_numbers(two, [differences], [], None)
    assert set(numbers) == {"text", "general", "differences"}
    values = {"mean": 0.2, "low": 0.1, "high": 0.3}
    assert numbers["differences"] == {
        "0.3": {"text": {"win": 1, "tie": 0, "loss": 0, "selector minus random": values}},
        "0.5": {
            "text": {
                "win": 1, "tie": 1, "loss": 0, "selector minus mmr": values,
                "selector minus random": {"mean": 0.0, "low": -0.1, "high": 0.1},
            }
        },
    }  # fmt: skip


def test_numbers_hold_adaptive_counts_and_what_was_measured(two):
    match = AdaptiveMatch(two.groups[0], "a_adaptive", score(0.25, 0.5), 0.4, Difference(0.1, 0.0, 0.2))
    lone = AdaptiveMatch(two.groups[0], "b_adaptive", score(0.25, 0.5), None, None)
    intrinsic = IntrinsicResults(
        keep=[0.1, 0.3],
        reducers={"a": IntrinsicCurves([0.9, 0.5], [0.8, 0.6], None)},
        overlap=OverlapMatrix(0.4, ["a", "b"], [[1.0, 0.3], [0.3, 1.0]]),
        stability=Stability([0.3, 0.7], 2, [0.6, 0.8]),
    )
    numbers = headlines.all_numbers(two, [], [match, lone], intrinsic)
    assert numbers["adaptive"] == {
        "text": {
            "a_adaptive": {
                "kept": 0.25, "adaptive": 0.5, "fixed": 0.4,
                "difference": {"mean": 0.1, "low": 0.0, "high": 0.2},
            }
        }
    }  # fmt: skip
    assert numbers["intrinsic"] == {
        "0.1": {"a": {"reconstruction": 0.9, "reconstruction_random": 0.8}},
        "0.3": {"a": {"reconstruction": 0.5, "reconstruction_random": 0.6}, "stability": 0.6},
        "0.7": {"stability": 0.8},
    }
    assert numbers["overlap"] == {"a": {"a": 1.0, "b": 0.3}, "b": {"a": 0.3, "b": 1.0}}


def test_relative_to_a_full_score_of_zero_is_one():
    assert headlines.relative(0.0, 0.0) == 1.0
    assert headlines.relative(0.3, 0.6) == 0.5
