import pytest

from atr.reporting import headlines
from atr.reporting.results import Comparison, Results, Score


def score(keep, mean):
    return Score(keep=keep, tokens=144 * keep, mean=mean, low=mean, high=mean)


def group(name, selector, random, full=0.8):
    curves = {"selector": (score(0.5, selector),), "random": (score(0.5, random),)}
    return Comparison("group", name, full=score(1.0, full), none=score(0.0, 0.1), curves=curves)


class Two(Results):
    """Two groups and nothing else."""

    groups = (group("text", 0.76, 0.3), group("general", 0.7, 0.725))
    benchmarks = ()


@pytest.fixture
def two():
    return Two({}, {})


def test_metrics_are_the_scores_and_what_follows_from_them(two):
    assert headlines.metrics(two)["text"] == {
        "full": 0.8,
        "none": 0.1,
        "selector@0.5": 0.76,
        "random@0.5": 0.3,
        "relative@0.5": pytest.approx(0.95),
        "difference@0.5": pytest.approx(0.46),
    }


def test_sentences_say_above_and_below(two):
    text, general = (sentence.replace("\N{NO-BREAK SPACE}", " ") for sentence in headlines.sentences(two))
    assert text.startswith("On the text group, with 50 % of the visual tokens kept (72 an image), the ")
    assert "selector holds 95.0 % of the full score (76.0 % of 80.0 %) and is 46.0 points above " in text
    assert text.endswith("above random selection (30.0 %).")
    assert "holds 87.5 % of the full score (70.0 % of 80.0 %) and is 2.5 points below" in general


def test_nothing_is_lost_of_a_full_score_of_zero():
    assert headlines.relative(0.0, 0.0) == 1.0
    assert headlines.relative(0.3, 0.6) == 0.5
