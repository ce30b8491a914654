from dataclasses import replace

import pytest

from atr.reporting import examples
from atr.reporting.examples import Case
from atr.reporting.results import Row


def case(benchmark, number, selector, random):
    def row(right):
        name = f"{benchmark}/{number}"
        return Row(name, benchmark, "text", name, "?", "a", 0.5, None, "a" if right else "b", float(right))

    return Case({"full": row(True), "random": row(random), "selector": row(selector)})


WON, LOST = (True, False), (False, True)
MANY = [case(benchmark, number, *WON) for benchmark in ("docs", "signs") for number in range(9)]
MANY += [case(benchmark, number, *LOST) for benchmark in ("docs", "shapes") for number in range(20, 29)]


def names(chosen):
    return [f"{chosen.row.id}" for chosen in chosen]


@pytest.mark.parametrize(
    "score, right", [(None, False), (0.0, False), (0.49, False), (0.5, True), (1.0, True)]
)
def test_an_answer_of_half_a_score_and_more_is_right(score, right):
    assert Row("a", "docs", "text", "a", "?", "a", 0.5, None, "a", score).right is right


def test_both_ways_are_shown_from_each_benchmark_in_turn():
    assert names(examples.choose(MANY, 6)) == [
        "docs/0",
        "signs/0",
        "docs/1",
        "signs/1",
        "docs/20",
        "shapes/20",
    ]


@pytest.mark.parametrize("count", range(1, 30))
@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (0, 9), (9, 0), (9, 1), (1, 9), (2, 2), (12, 9)])
def test_as_many_as_there_are_and_one_the_other_way_round_if_any(count, wins, losses):
    given = [case("docs", number, *WON) for number in range(wins)]
    given += [case("docs", 100 + number, *LOST) for number in range(losses)]
    outcomes = [chosen.outcome for chosen in examples.choose(given, count)]
    assert len(outcomes) == min(count, wins + losses)
    assert (LOST in outcomes) == (losses > 0 and (count > 1 or wins == 0))
    assert (WON in outcomes) == (wins > 0)


def test_cases_on_which_they_agree_are_not_shown():
    given = [case("docs", 0, True, True), case("docs", 1, False, False), case("docs", 2, *WON)]
    assert names(examples.choose(given, 6)) == ["docs/2"]


def test_an_image_is_shown_once():
    twice = [case("docs", 0, *WON), case("docs", 0, *WON), case("docs", 1, *WON)]
    assert names(examples.choose(twice, 6)) == ["docs/0", "docs/1"]


def test_answered_are_those_that_all_tokens_answer_rightly(measured):
    answered = examples.answered(measured)
    right = [row.id for row in measured.evaluations["full"].rows if row.right]
    assert [each.row.id for each in answered] == right
    assert {each.answers["selector"].keep for each in answered} == {0.5}
    assert {each.answers["random"].seed for each in answered} == {0}


def test_agreement_counts_every_question_once(measured):
    answered = examples.answered(measured)
    assert sum(examples.agreement(answered, "docs").values()) == sum(
        each.row.benchmark == "docs" for each in answered
    )


def test_a_question_that_a_line_could_not_answer_is_no_case(measured):
    first = examples.answered(measured)[0].row.id
    random = measured.evaluations["random"]
    rows = [replace(row, score=None, prediction="") if row.id == first else row for row in random.rows]
    evaluations = measured.evaluations | {"random": replace(random, rows=rows)}
    spoilt = replace(measured, evaluations=evaluations)
    assert first not in {each.row.id for each in examples.answered(spoilt)}
    assert len(examples.answered(spoilt)) == len(examples.answered(measured)) - 1
    assert (spoilt.unanswered, measured.unanswered) == ({first}, set())


def test_a_question_without_an_image_is_not_shown():
    blind = case("docs", 0, *WON)
    blind = Case({name: replace(row, image="") for name, row in blind.answers.items()})
    assert names(examples.choose([blind, case("docs", 1, *WON)], 6)) == ["docs/1"]
