from dataclasses import replace

import pytest

from atr.core.records import Row
from atr.reporting import examples
from atr.reporting.examples import Case


def case(benchmark, number, selector, random):
    def row(right):
        name = f"{benchmark}/{number}"
        return answer(name, benchmark, float(right))

    return Case({"full": row(True), "random": row(random), "selector": row(selector)})


def answer(name, benchmark="docs", score=1.0):
    prediction = "a" if score else "b"
    return Row(
        name, benchmark, "text", "?", ["a"], 0.5, None, 5, 5, 10, prediction, score, score, images=[name]
    )  # fmt: skip


WON, LOST = (True, False), (False, True)
MANY = [case(benchmark, number, *WON) for benchmark in ("docs", "signs") for number in range(9)]
MANY += [case(benchmark, number, *LOST) for benchmark in ("docs", "shapes") for number in range(20, 29)]


def names(chosen):
    return [f"{chosen.row.id}" for chosen in chosen]


@pytest.mark.parametrize(
    "score, right", [(None, False), (0.0, False), (0.49, False), (0.5, True), (1.0, True)]
)
def test_an_answer_of_half_a_score_and_more_is_right(score, right):
    assert examples.is_right(answer("a", score=score)) is right


def test_both_ways_are_shown_from_each_benchmark_in_turn():
    assert names(examples.choose_cases(MANY, 6)) == [
        "docs/0",
        "signs/0",
        "docs/1",
        "signs/1",
        "docs/20",
        "shapes/20",
    ]


@pytest.mark.parametrize("count", range(1, 30))
@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (0, 9), (9, 0), (9, 1), (1, 9), (2, 2), (12, 9)])
def test_all_cases_are_shown_if_few_and_one_that_random_wins_if_any(count, wins, losses):
    given = [case("docs", number, *WON) for number in range(wins)]
    given += [case("docs", 100 + number, *LOST) for number in range(losses)]
    outcomes = [chosen.outcome for chosen in examples.choose_cases(given, count)]
    assert len(outcomes) == min(count, wins + losses)
    assert (LOST in outcomes) == (losses > 0 and (count > 1 or wins == 0))
    assert (WON in outcomes) == (wins > 0)


def test_cases_on_which_they_agree_are_not_shown():
    given = [case("docs", 0, True, True), case("docs", 1, False, False), case("docs", 2, *WON)]
    assert names(examples.choose_cases(given, 6)) == ["docs/2"]


def test_an_image_is_shown_once():
    twice = [case("docs", 0, *WON), case("docs", 0, *WON), case("docs", 1, *WON)]
    assert names(examples.choose_cases(twice, 6)) == ["docs/0", "docs/1"]


def test_cases_are_answered_rightly_with_all_tokens(measured):
    cases = examples.find_cases(measured)
    right = [row.id for row in measured.evaluations["full"].rows if examples.is_right(row)]
    assert [each.row.id for each in cases] == right
    assert {each.answers["selector"].keep for each in cases} == {0.5}
    assert {each.answers["random"].seed for each in cases} == {0}


def test_outcomes_count_every_question_once(measured):
    cases = examples.find_cases(measured)
    assert sum(examples.count_outcomes(cases, "docs").values()) == sum(
        each.row.benchmark == "docs" for each in cases
    )


def test_a_question_that_a_reducer_could_not_answer_is_no_case(measured):
    first = examples.find_cases(measured)[0].row.id
    random = measured.evaluations["random"]
    rows = [replace(row, score=None, prediction="") if row.id == first else row for row in random.rows]
    evaluations = measured.evaluations | {"random": replace(random, rows=rows)}
    spoilt = replace(measured, evaluations=evaluations)
    assert first not in {each.row.id for each in examples.find_cases(spoilt)}
    assert len(examples.find_cases(spoilt)) == len(examples.find_cases(measured)) - 1
    assert (spoilt.unanswered, measured.unanswered) == ({first}, set())


def test_a_question_without_an_image_is_not_shown():
    blind = case("docs", 0, *WON)
    blind = Case({name: replace(row, images=[]) for name, row in blind.answers.items()})
    assert names(examples.choose_cases([blind, case("docs", 1, *WON)], 6)) == ["docs/1"]
