from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from atr.benchmarks.summary import summarise
from atr.core.catalog import reducer_traits
from atr.core.records import Row
from atr.reporting.paired import LOSS, TIE, WIN, Difference, match_adaptive, paired_differences
from atr.reporting.results import Evaluation, Results, ScorePoint

GROUPS = {"docs": "text", "signs": "text", "shapes": "general"}
RESAMPLES = 400


def rows(benchmark, keep, scores, units=None):
    """Rows of scores (seeds, questions), or (questions,) of a deterministic reducer."""
    drawn = np.atleast_2d(np.asarray(scores, dtype=float))
    seeds = [None] if np.ndim(scores) == 1 else range(len(drawn))
    return [
        Row(
            id=f"{benchmark}/{number}",
            benchmark=benchmark,
            group=GROUPS[benchmark],
            question="?",
            answers=["a"],
            keep=keep,
            seed=seed,
            tokens=5,
            tokens_fed=5,
            tokens_full=10,
            prediction="a",
            score=None if np.isnan(score) else float(score),
            anls=None if np.isnan(score) else float(score),
            unit=units[number] if units else "",
        )
        for seed, line in zip(seeds, drawn, strict=True)
        for number, score in enumerate(line)
    ]


def evaluation(name, answers, tokens=None, resamples=RESAMPLES, seed=0, units=None):
    """Results of a reducer with scores by (benchmark, keep)."""
    cells: dict = {}
    for (benchmark, keep), scores in answers.items():
        for kind, part in (("benchmark", benchmark), ("group", GROUPS[benchmark])):
            cells.setdefault((kind, part, keep), []).append(np.nanmean(scores))
    curves: dict = {}
    for (kind, part, keep), means in sorted(cells.items(), key=lambda cell: cell[0][2] or 0):
        kept = tokens / 100 if keep is None else keep
        point = ScorePoint(kept, 100 * kept, 100 * kept, float(np.mean(means)), 0.0, 1.0)
        curves[kind, part] = (*curves.get((kind, part), ()), point)
    lines = [
        row for (benchmark, keep), scores in answers.items() for row in rows(benchmark, keep, scores, units)
    ]
    budget = reducer_traits(name).budget
    return Evaluation(name, budget, "e", "v", 100.0, curves, lines, None, resamples, seed, {}, None, {})


def results(answers, **settings):
    """Results of reducers by name; `full` and `none` are by default always right and always wrong."""
    first = next(iter(answers.values()))
    ones = {benchmark: np.ones(np.shape(scores)[-1]) for (benchmark, _), scores in first.items()}
    ends = {
        "full": {(benchmark, 1.0): scores for benchmark, scores in ones.items()},
        "none": {(benchmark, 0.0): 0 * scores for benchmark, scores in ones.items()},
    }
    every = {name: evaluation(name, cells, **settings) for name, cells in (ends | answers).items()}
    return Results(every, None)


def pair(ours, theirs, **settings):
    """The difference of a selector and random on one benchmark."""
    evaluated = results({"selector": {("docs", 0.5): ours}, "random": {("docs", 0.5): theirs}}, **settings)
    return paired_differences(evaluated, "selector")[0].others["random"][0.5]


def correlated(draw, chances, count):
    """Right and wrong answers of two reducers that find the same questions hard."""
    difficulty = draw.random(count) * 0.7 + draw.random(count) * 0.3
    return [(difficulty < chance).astype(float) for chance in chances]


def test_the_interval_is_the_paired_one_of_scipy():
    ours, theirs = correlated(np.random.default_rng(0), (0.7, 0.6), 300)
    difference = pair(ours, theirs, resamples=20000)
    reference = stats.bootstrap(
        (ours, theirs), lambda a, b, axis: a.mean(axis) - b.mean(axis),
        paired=True, n_resamples=20000, method="percentile", rng=1,
    ).confidence_interval  # fmt: skip
    assert difference.mean == pytest.approx(ours.mean() - theirs.mean(), abs=1e-12)
    assert (difference.low, difference.high) == pytest.approx((reference.low, reference.high), abs=0.004)
    unpaired = 2 * 1.96 * np.sqrt((ours.var() + theirs.var()) / 300)
    assert difference.high - difference.low < 0.7 * unpaired


def test_a_group_is_the_mean_of_its_benchmarks_whatever_their_sizes():
    draw = np.random.default_rng(1)
    docs, signs = correlated(draw, (0.8, 0.5), 30), correlated(draw, (0.4, 0.5), 200)
    evaluated = results(
        {
            name: {("docs", 0.5): docs[place], ("signs", 0.5): signs[place]}
            for place, name in enumerate(("selector", "random"))
        },
        resamples=20000,
    )
    group, *_ = paired_differences(evaluated, "selector")
    difference = group.others["random"][0.5]
    parts = [docs[0] - docs[1], signs[0] - signs[1]]
    assert difference.mean == pytest.approx(np.mean([part.mean() for part in parts]))
    generator = np.random.default_rng(2)
    means = [np.mean([generator.choice(part, len(part)).mean() for part in parts]) for _ in range(8000)]
    assert (difference.low, difference.high) == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=0.006)


def test_the_true_difference_of_a_group_is_in_95_of_100_intervals():
    """Two benchmarks of unequal size, questions that both reducers find hard: 500 made-up evaluations."""
    chances = (0.62, 0.5)
    many = correlated(np.random.default_rng(99), chances, 1_000_000)
    truth = many[0].mean() - many[1].mean()
    covered = []
    for trial in range(500):
        draw = np.random.default_rng(trial)
        docs, signs = correlated(draw, chances, 80), correlated(draw, chances, 150)
        evaluated = results(
            {
                name: {("docs", 0.5): docs[place], ("signs", 0.5): signs[place]}
                for place, name in enumerate(("selector", "random"))
            },
            seed=trial,
        )
        difference = paired_differences(evaluated, "selector")[0].others["random"][0.5]
        covered.append(difference.low <= truth <= difference.high)
    # 0.95 within three standard errors of 500 trials
    assert np.mean(covered) == pytest.approx(0.95, abs=0.03)


def test_a_random_answer_counts_as_its_mean_over_seeds():
    ours, theirs = np.array([1.0, 0, 1, 1]), np.array([[1, 0, 0, 1], [0, 0, 1, 1], [0, 1, 0, 1.0]])
    difference = pair(ours, theirs)
    same = pair(ours, theirs.mean(axis=0))
    assert difference == same
    assert difference.mean == pytest.approx(0.75 - theirs.mean())


def test_equal_answers_are_a_tie_of_exactly_nothing():
    answers = np.random.default_rng(0).integers(0, 2, (3, 50)).astype(float)
    assert pair(answers, answers) == Difference(0.0, 0.0, 0.0)
    assert pair(answers, answers).outcome == TIE


def test_always_right_wins_against_always_wrong_and_the_other_way_round():
    assert pair(np.ones(20), np.zeros(20)) == Difference(1.0, 1.0, 1.0)
    assert pair(np.ones(20), np.zeros(20)).outcome == WIN
    assert pair(np.zeros(20), np.ones(20)).outcome == LOSS


def test_one_question_of_many_decides_nothing():
    ours = np.zeros(300)
    ours[7] = 1
    difference = pair(ours, np.zeros(300))
    assert difference.mean > 0 and difference.outcome == TIE


@pytest.mark.parametrize(
    ("low", "high", "outcome"),
    [(0.01, 0.2, WIN), (-0.2, -0.01, LOSS), (-0.1, 0.3, TIE), (0.0, 0.1, TIE), (-0.1, 0.0, TIE),
     (1e-17, 0.1, TIE), (-0.1, -1e-17, TIE)],
)  # fmt: skip
def test_the_outcome_is_by_the_interval_and_no_rounding_makes_a_win(low, high, outcome):
    assert Difference(0.05, low, high).outcome == outcome


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=30))
def test_turned_round_the_difference_is_its_negative(answers):
    ours, theirs = (np.array(line, dtype=float) for line in zip(*answers, strict=True))
    one, two = pair(ours, theirs), pair(theirs, ours)
    assert (one.mean, one.low, one.high) == pytest.approx((-two.mean, -two.high, -two.low), abs=1e-12)
    assert one.low - 1e-12 <= one.high and (one.outcome == WIN) == (two.outcome == LOSS)


def test_questions_of_a_unit_count_only_together():
    units = ["u0", "u0", "u1", "u1"]
    ours, theirs = np.array([1.0, 1, 1, 0]), np.array([1.0, 0, 0, 0])
    assert pair(ours, theirs, units=units).mean == 0.5
    assert pair(ours, np.zeros(4), units=units).mean == 0.5
    assert pair(ours, np.zeros(4)).mean == 0.75


def test_only_questions_that_both_answered_are_compared():
    ours = np.array([1.0, 1.0, 0.0, np.nan, 1.0])
    theirs = np.array([[0, np.nan, 0, 1, 1], [0, 1, 0, 1, 1.0]])
    assert pair(ours, theirs).mean == pytest.approx(1 / 3)
    assert pair(ours, theirs) == pair(ours[[0, 2, 4]], theirs[:, [0, 2, 4]])


def test_a_unit_of_which_one_question_is_not_answered_is_not_compared():
    units = ["u0", "u0", "u1", "u1"]
    ours, theirs = np.array([1.0, np.nan, 1, 1]), np.array([1.0, 1, 1, 0])
    assert pair(ours, theirs, units=units).mean == 1  # u1 alone
    assert pair(theirs, ours, units=units).mean == -1


def test_a_group_has_no_difference_where_one_of_its_benchmarks_has_none():
    """No question of signs was answered by both: the mean of docs alone is not the group's."""
    evaluated = results(
        {
            "selector": {("docs", 0.5): np.ones(2), ("signs", 0.5): np.array([np.nan, 1.0])},
            "random": {("docs", 0.5): np.zeros(2), ("signs", 0.5): np.array([1.0, np.nan])},
        }
    )
    found = {
        part.comparison.name: part.others["random"] for part in paired_differences(evaluated, "selector")
    }
    assert (found["text"], found["signs"]) == ({}, {})
    assert found["docs"][0.5].mean == 1


def test_differences_are_those_of_the_summaries():
    """The bootstrap draws the same questions as in stage evaluate, so means and intervals agree."""
    draw = np.random.default_rng(4)
    answers = {
        "selector": {(name, 0.5): draw.integers(0, 2, 40).astype(float) for name in GROUPS},
        "random": {(name, 0.5): draw.integers(0, 2, (3, 40)).astype(float) for name in GROUPS},
    }
    evaluated = results(answers)
    lines = {}
    for name, each in evaluated.evaluations.items():
        entries = summarise(each.rows, RESAMPLES, 0)
        lines[name] = {entry.get("group") or entry["benchmark"]: entry for entry in entries}
    for found in paired_differences(evaluated, "selector"):
        name = found.comparison.name
        means = [lines[reducer][name]["mean"] for reducer in ("selector", "random")]
        assert found.others["random"][0.5].mean == pytest.approx(means[0] - means[1], abs=1e-12)
    zero = results({name: answers["selector"] if name == "selector" else {
        (part, 0.5): np.zeros(40) for part in GROUPS} for name in answers})  # fmt: skip
    for found in paired_differences(zero, "selector"):
        entry, difference = lines["selector"][found.comparison.name], found.others["random"][0.5]
        assert (difference.low, difference.high) == pytest.approx((entry["low"], entry["high"]), abs=1e-12)


def test_reducers_are_compared_at_the_kept_fractions_of_both():
    right, wrong = np.ones(10), np.zeros(10)
    evaluated = results(
        {
            "selector": {("docs", 0.3): right, ("docs", 0.5): right},
            "random": {("docs", 0.5): wrong, ("docs", 0.7): wrong},
            "divprune": {("docs", 0.3): right, ("docs", 0.5): wrong},
            "prumerge_adaptive": {("docs", None): right},
        },
        tokens=50,
    )
    group, benchmark = paired_differences(evaluated, "selector")
    assert (group.comparison.kind, benchmark.comparison.kind) == ("group", "benchmark")
    assert {name: list(line) for name, line in group.others.items()} == {
        "random": [0.5], "divprune": [0.3, 0.5],
    }  # fmt: skip
    assert group.keeps == [0.3, 0.5]
    assert dict(group.outcomes(0.5)) == {WIN: 2} and dict(group.outcomes(0.3)) == {TIE: 1}
    assert paired_differences(evaluated, "divprune")[0].others["selector"][0.5].mean == -1


@pytest.mark.parametrize("best", ["full", "divprun", "prumerge_adaptive"])
def test_a_best_reducer_without_results_is_named(best):
    answers = {name: {("docs", 0.5): np.ones(4)} for name in ("selector", "random")}
    answers |= {"prumerge_adaptive": {("docs", None): np.ones(4)}}
    with pytest.raises(ValueError, match=f"report.best: '{best}' is not .*, allowed: selector, random$"):
        paired_differences(results(answers, tokens=50), best)


def adaptive(tokens, answers, count=40):
    """Matches of an adaptive selector against one that answers a third, and half of the questions."""
    third, half = np.arange(count) % 3 == 0, np.arange(count) % 2 == 0
    fixed = {("docs", 0.2): third, ("docs", 0.4): half}
    evaluated = results(
        {"selector": fixed, "random": fixed, "selector_adaptive": {("docs", None): answers(third, half)}},
        tokens=tokens,
    )
    return [third.mean(), half.mean()], match_adaptive(evaluated)


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
def test_an_adaptive_count_stands_beside_the_fixed_ones_at_the_same_mean_tokens(weight):

    def mix(third, half):
        return (1 - weight) * third + weight * half

    levels, (group, benchmark) = adaptive(20 + 20 * weight, mix)
    for match in (group, benchmark):
        assert match.fixed == pytest.approx((1 - weight) * levels[0] + weight * levels[1])
        assert (match.difference.mean, match.difference.low) == pytest.approx((0, 0), abs=1e-12)
        assert match.difference.outcome == TIE
    _, (better, _) = adaptive(20 + 20 * weight, lambda third, half: mix(third, half) + 0.1)
    assert (better.difference.low, better.difference.high) == pytest.approx((0.1, 0.1))
    assert better.difference.outcome == WIN


def test_above_the_largest_budget_the_curve_ends_at_all_tokens_and_below_the_smallest_there_is_none():
    _, (match, _) = adaptive(70, lambda third, half: (half + 1) / 2)
    assert (match.fixed, match.difference.mean) == (pytest.approx(0.75), pytest.approx(0, abs=1e-12))
    _, (match, _) = adaptive(10, lambda third, half: half)
    assert (match.fixed, match.difference) == (None, None)


def test_a_group_is_matched_at_its_own_mean_tokens_not_at_those_of_each_benchmark():
    fixed = {(name, keep): np.full(6, keep) for name in ("docs", "signs") for keep in (0.2, 0.6)}
    answers = {("docs", None): np.zeros(6), ("signs", None): np.zeros(6)}
    evaluated = results({"selector": fixed, "random": fixed})
    spread = evaluation("selector_adaptive", answers, tokens=40)
    few, many = (ScorePoint(tokens / 100, tokens, tokens, 0.0, 0.0, 0.0) for tokens in (30, 50))
    curves = spread.curves | {("benchmark", "docs"): (few,), ("benchmark", "signs"): (many,)}
    evaluated.evaluations["selector_adaptive"] = replace(spread, curves=curves)
    found = {match.comparison.name: match.fixed for match in match_adaptive(evaluated)}
    assert found == {"text": pytest.approx(0.4), "docs": pytest.approx(0.3), "signs": pytest.approx(0.5)}


def test_an_adaptive_count_without_its_counterpart_is_listed_without_a_difference():
    answers = {name: {("docs", 0.5): np.ones(4)} for name in ("selector", "random")}
    evaluated = results(answers | {"prumerge_adaptive": {("docs", None): np.ones(4)}}, tokens=50)
    assert [(match.adaptive, match.fixed, match.difference) for match in match_adaptive(evaluated)] == [
        ("prumerge_adaptive", None, None)
    ] * 2
