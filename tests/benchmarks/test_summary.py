import random
from dataclasses import replace

import numpy as np
import pytest

from atr.benchmarks.summary import mean_tokens_full, score_curves, summarise
from atr.core.records import Row


def row(benchmark, number, keep, seed, score, group="text"):
    return Row(
        id=f"{benchmark}/{number}#0",
        benchmark=benchmark,
        group=group,
        images=[f"{benchmark}/{number}"],
        question="total",
        answers=["17"],
        keep=keep,
        seed=seed,
        tokens=round(144 * keep),
        tokens_fed=round(144 * keep) + 12,
        tokens_full=144,
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
    assert (docs["tokens"], docs["tokens_fed"], docs["questions"], docs["seeds"]) == (72, 84, 4, 2)
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


def unanswered(line, status):
    return replace(line, status=status, error="why", score=None, anls=None, tokens=0)


def test_only_what_is_answered_under_every_seed_is_in_the_mean_and_the_rest_is_counted():
    table = [*rows("docs", [1, 0, 1, 1, 1], seed=0), *rows("docs", [1, 1, 1, 1, 0], seed=1)]
    table[3], table[8] = unanswered(table[3], "unreadable"), unanswered(table[8], "unreadable")
    table[4] = unanswered(table[4], "failed")
    docs = entry(summarise(table, 100, 0), benchmark="docs")
    assert (docs["questions"], docs["answered"], docs["unreadable"], docs["failed"]) == (5, 3, 1, 1)
    assert docs["mean"] == pytest.approx((1 + 0.5 + 1) / 3)
    assert docs["seed_means"] == pytest.approx([2 / 3, 1.0])
    assert docs["tokens"] == 72
    same = entry(summarise([*table[:3], *table[5:8]], 100, 0), benchmark="docs")
    for key in ("mean", "low", "high", "anls", "seed_means"):
        assert docs[key] == same[key]
    text = entry(
        summarise([*table, *rows("signs", [1], seed=0), *rows("signs", [1], seed=1)], 10, 0), group="text"
    )
    assert (text["questions"], text["answered"], text["unreadable"], text["failed"]) == (6, 4, 1, 1)


def test_a_unit_is_right_if_each_of_its_questions_is():
    table = [
        replace(line, unit=f"docs/{number // 2}")
        for seed, right in ((0, [1, 1, 1, 0, 0, 0, 1]), (1, [1, 0, 1, 1, 0, 1, 1]))
        for number, line in enumerate(rows("docs", right, seed=seed))
    ]
    docs = entry(summarise(table, 100, 0), benchmark="docs")
    assert docs["seed_means"] == [0.5, 0.5]  # units 0 and 3 of four, then units 1 and 3
    assert docs["mean"] == 0.5 and docs["questions"] == docs["answered"] == 4
    table[1] = unanswered(table[1], "failed")
    docs = entry(summarise(table, 100, 0), benchmark="docs")
    assert (docs["answered"], docs["failed"]) == (3, 1)
    assert docs["seed_means"] == pytest.approx([1 / 3, 2 / 3])


def test_a_benchmark_without_an_answer_is_named_with_the_reason():
    table = [unanswered(line, "failed") for line in rows("docs", [1, 1])]
    with pytest.raises(ValueError, match=r"docs: no question is answered at kept fraction 0.5: why"):
        summarise([*table, *rows("signs", [1])], 10, 0)


def test_tokens_are_means_over_the_questions_and_those_of_a_failed_one_are_not_among_them():
    table = [
        replace(made, tokens=tokens, tokens_full=full)
        for made, tokens, full in zip(
            [*rows("docs", [1, 0, 1], keep=0.2), *rows("docs", [1, 0, 1], keep=0.5)],
            [10, 30, 20, 25, 75, 50], [50, 150, 100] * 2, strict=True,
        )
    ]  # fmt: skip
    assert mean_tokens_full(table) == 100
    assert [(score["tokens"], score["tokens_full"]) for score in summarise(table, 10, 0)[:2]] == [
        (20, 100), (50, 100),
    ]  # fmt: skip
    lost = replace(
        table[4], status="failed", error="too long", score=None, anls=None, tokens=0, tokens_full=0
    )
    assert mean_tokens_full([*table[:4], lost, table[5]]) == 100  # answered at another kept fraction
    half = summarise([*table[:4], lost, table[5]], 10, 0)[1]
    assert (half["tokens"], half["tokens_full"]) == (37.5, 75)


def test_an_adaptive_count_stands_at_its_mean_fraction_and_questions_without_image_at_one():
    table = [
        *(replace(line, tokens=36, keep=None) for line in rows("docs", [1, 0])),
        *(replace(line, tokens=0, tokens_full=0, keep=None) for line in rows("shapes", [1], group="general")),
    ]
    assert list(score_curves(summarise(table, 10, 0))) == [
        (0.25, "docs", 0.5), (1.0, "shapes", 1.0), (0.25, "text", 0.5), (1.0, "general", 1.0),
    ]  # fmt: skip
    none = [replace(line, tokens=0, tokens_full=0, keep=0.0) for line in rows("docs", [1])]
    assert [keep for keep, _, _ in score_curves(summarise(none, 10, 0))] == [0.0, 0.0]


def test_the_tokens_of_a_group_are_weighed_as_its_score_is():
    """Few questions that keep many tokens, and many that keep few: the score weighs both benchmarks alike."""
    docs = [replace(line, tokens=90, tokens_fed=100, tokens_full=120) for line in rows("docs", [1] * 10)]
    signs = [replace(line, tokens=10, tokens_fed=12, tokens_full=40) for line in rows("signs", [0] * 1000)]
    text = entry(summarise([*docs, *signs], 10, 0), group="text")
    assert (text["mean"], text["tokens"], text["tokens_fed"], text["tokens_full"]) == (0.5, 50, 56, 80)


def test_the_tokens_of_a_benchmark_are_those_of_the_units_that_its_score_is_a_mean_of():
    unit = [replace(line, unit="docs/0", tokens=30) for line in rows("docs", [1, 1, 1])]
    alone = replace(row("docs", 3, 0.5, None, 1.0), tokens=10)
    spoilt = [replace(row("docs", number, 0.5, None, 1.0), unit="docs/4", tokens=80) for number in (4, 5)]
    table = [*unit, alone, spoilt[0], unanswered(spoilt[1], "failed")]
    assert entry(summarise(table, 10, 0), benchmark="docs")["tokens"] == 20


def test_an_adaptive_count_is_a_point_without_a_kept_fraction():
    table = [
        replace(line, tokens=tokens)
        for line, tokens in zip(rows("docs", [1, 0, 1, 0], keep=0.5), (10, 20, 30, 12), strict=True)
    ]
    fixed, adaptive = (summarise([replace(line, keep=keep) for line in table], 50, 0) for keep in (0.5, None))
    assert [score["keep"] for score in adaptive] == [None, None]
    assert [score | {"keep": 0.5} for score in adaptive] == fixed
    assert (adaptive[0]["tokens"], adaptive[0]["tokens_full"]) == (18, 144)
