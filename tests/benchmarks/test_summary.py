import random
from dataclasses import replace

import numpy as np
import pytest

from atr.benchmarks.loop import Row
from atr.benchmarks.summary import summarise


def row(benchmark, number, keep, seed, score, group="text"):
    return Row(
        id=f"{benchmark}/{number}#0",
        benchmark=benchmark,
        group=group,
        image=f"{benchmark}/{number}",
        question="total",
        answer="17",
        keep=keep,
        seed=seed,
        tokens=round(144 * keep),
        prediction="17",
        score=score,
        anls=score / 2,
    )


def rows(benchmark, right, keep=0.5, seed=None, group="text"):
    return [row(benchmark, number, keep, seed, float(value), group) for number, value in enumerate(right)]


def entry(scores, **wanted):
    [found] = [score for score in scores if wanted.items() <= score.items()]
    return found


def test_means_are_over_questions_then_seeds_then_benchmarks():
    table = [
        *rows("docs", [1, 1, 0, 0], seed=0),
        *rows("docs", [1, 0, 0, 0], seed=1),
        *rows("signs", [1, 1], seed=0),
        *rows("signs", [1, 0], seed=1),
        *rows("shapes", [0, 0], seed=0, group="general"),
        *rows("shapes", [0, 0], seed=1, group="general"),
    ]
    scores = summarise(table, 100, seed=0)
    docs = entry(scores, benchmark="docs")
    assert (docs["mean"], docs["anls"], docs["seed_means"]) == (0.375, 0.1875, [0.5, 0.25])
    assert (docs["tokens"], docs["questions"], docs["seeds"]) == (72, 4, 2)
    text = entry(scores, group="text")
    assert text["mean"] == pytest.approx((0.375 + 0.75) / 2)
    assert text["seed_means"] == pytest.approx([0.75, 0.375])
    assert text["questions"] == 6
    assert entry(scores, group="general")["mean"] == entry(scores, group="general")["high"] == 0
    assert [score.get("benchmark") or score["group"] for score in scores] == [
        "docs", "signs", "shapes", "text", "general",
    ]  # fmt: skip


def test_the_interval_is_that_of_the_binomial():
    right = np.random.default_rng(0).random(400) < 0.7
    docs = entry(summarise(rows("docs", right), 4000, seed=0), benchmark="docs")
    half_width = 1.96 * np.sqrt(right.mean() * (1 - right.mean()) / 400)
    assert docs["low"] == pytest.approx(right.mean() - half_width, abs=0.005)
    assert docs["high"] == pytest.approx(right.mean() + half_width, abs=0.005)


def test_a_groups_interval_is_that_of_a_mean_of_independent_benchmarks():
    draw = np.random.default_rng(1)
    answers = {
        name: draw.random(300) < share for name, share in (("docs", 0.5), ("signs", 0.8), ("charts", 0.3))
    }
    scores = summarise([line for name, right in answers.items() for line in rows(name, right)], 4000, seed=0)
    error = np.sqrt(sum(right.mean() * (1 - right.mean()) / 300 for right in answers.values())) / 3
    text = entry(scores, group="text")
    assert text["high"] - text["low"] == pytest.approx(2 * 1.96 * error, rel=0.08)


def test_the_same_questions_are_drawn_at_every_kept_fraction():
    """Equal answers give equal intervals, whatever else is in the table: curves are compared pair by pair."""
    right = np.random.default_rng(2).random(50) < 0.5
    together = summarise(
        [*rows("docs", right, 0.1), *rows("signs", right, 0.1), *rows("docs", right, 0.9)], 300, 5
    )
    alone = summarise(rows("docs", right, 0.1), 300, 5)
    few, many = (entry(together, benchmark="docs", keep=keep) for keep in (0.1, 0.9))
    assert (few["low"], few["high"]) == (many["low"], many["high"])
    assert few == entry(alone, benchmark="docs")
    assert summarise(rows("docs", right, 0.1), 300, 6) != alone


def test_the_order_of_the_seeds_and_a_repetition_do_not_matter():
    table = [*rows("docs", [1, 0, 1], seed=0), *rows("docs", [0, 0, 1], seed=1)]
    shuffled = random.Random(0).sample(table, len(table))
    first, second = (entry(summarise(t, 200, 0), benchmark="docs") for t in (table, table))
    assert first == second
    assert entry(summarise(shuffled, 200, 0), benchmark="docs")["mean"] == first["mean"]


def test_a_question_that_a_seed_left_out_is_our_error():
    table = [*rows("docs", [1, 0, 1], seed=0), *rows("docs", [0, 0, 1], seed=1)]
    with pytest.raises(AssertionError):
        summarise(table[:-1], 10, 0)
    with pytest.raises(AssertionError):
        summarise([*table, replace(table[0], score=0.0)], 10, 0)
