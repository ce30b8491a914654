import pytest

from atr.reporting.results import fixed_counterpart

PAPER = ("full", "none", "random", "selector")


def scores_without(change, folder, unwanted):
    def without(content):
        content["scores"] = [entry for entry in content["scores"] if not unwanted(entry)]

    change(folder / "summary.json", without)


def test_comparisons_follow_the_order_of_evaluation_and_curves_rise(measured, synthetic):
    assert [comparison.name for comparison in measured.groups] == ["text", "general"]
    assert [comparison.name for comparison in measured.benchmarks] == list(synthetic.GROUPS)
    docs = measured.benchmarks[0]
    assert list(docs.curves) == ["selector", "random"]
    assert docs.keeps == [score.keep for score in docs.curves["selector"]] == synthetic.KEEPS
    assert (docs.full.keep, docs.none.keep) == (1.0, 0.0)


def test_a_mean_is_the_one_of_its_rows(measured):
    rows = [row for row in measured.evaluations["random"].rows if (row.benchmark, row.keep) == ("docs", 0.3)]
    assert measured.benchmarks[0].mean("random", 0.3) == pytest.approx(
        sum(row.score for row in rows) / len(rows)
    )
    assert measured.benchmarks[0].mean("random", 0.35) is None


def test_other_reducers_join_after_the_papers_own(world, load, synthetic):
    synthetic.write(world, reducers=("divprune", "dart"))
    loaded = load(world, ["divprune", "dart", *PAPER])
    assert loaded.budgeted == ["selector", "random", "dart", "divprune"]


def test_an_adaptive_reducer_has_one_score_at_its_mean_kept_fraction(crowd, synthetic):
    assert crowd.adaptive == ["prumerge_adaptive", "selector_adaptive"]
    assert not set(crowd.adaptive) & set(crowd.budgeted)
    rows = crowd.evaluations["selector_adaptive"].rows
    assert {row.keep for row in rows} == {None}
    docs = crowd.benchmarks[0]
    assert (
        docs.adaptive["selector_adaptive"].keep
        == docs.adaptive["selector_adaptive"].tokens / synthetic.TOKENS
    )
    assert 0.2 < docs.adaptive["selector_adaptive"].keep < 0.4
    assert set(docs.keeps) == set(synthetic.KEEPS)


def test_a_comparison_names_the_benchmarks_of_its_mean(measured, synthetic):
    assert [comparison.benchmarks for comparison in measured.groups] == [
        ("docs", "signs", "charts"), ("shapes", "digits", "scenes"),
    ]  # fmt: skip
    assert [comparison.benchmarks for comparison in measured.benchmarks] == [
        (name,) for name in synthetic.GROUPS
    ]


def test_half_is_the_nearest_kept_fraction_that_selector_and_random_share(world, load, change):
    assert load(world).half == 0.5
    scores_without(change, world / "evaluate/random", lambda entry: entry["keep"] in (0.5, 0.6))
    assert load(world).half == 0.4


def test_of_several_seeds_the_lowest_answers(measured):
    answers = measured.answers("random", 0.5)
    assert {row.seed for row in answers.values()} == {0}
    assert set(answers) == set(measured.answers("full", 1.0))


@pytest.mark.parametrize("left_out", [{"none"}, {"random"}, {"none", "random"}])
def test_reducers_that_were_not_evaluated_have_no_lines(world, load, left_out):
    loaded = load(world, [name for name in PAPER if name not in left_out])
    assert loaded.budgeted == (["selector"] if "random" in left_out else ["selector", "random"])
    assert [comparison.none is None for comparison in loaded.groups] == ["none" in left_out] * 2
    assert loaded.half == 0.5


def test_the_counterpart_of_an_adaptive_reducer_has_its_name_without_the_ending():
    assert fixed_counterpart("selector_adaptive") == "selector"
    assert fixed_counterpart("my_package/my_reducer") == "my_package/my_reducer"
