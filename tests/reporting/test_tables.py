from dataclasses import replace

from atr.reporting import tables
from atr.reporting.intrinsic import Cost, Measure, Overlap, Prefill, Selection, Spent, Stability
from atr.reporting.paired import Difference, Match, Versus
from atr.reporting.results import Comparison, Score
from atr.reporting.tables import Table


def score(keep, mean):
    return Score(keep=keep, tokens=10, tokens_fed=10, mean=mean, low=mean, high=mean)


def test_scores_are_in_percent_relative_to_full_and_to_the_others():
    curves = {
        "selector": (score(0.3, 0.6), score(0.5, 0.72)),
        "random": (score(0.3, 0.2), score(0.5, 0.4)),
        "other": (score(0.5, 0.76),),
    }
    comparison = Comparison("group", "text", full=score(1, 0.8), none=score(0, 0.05), curves=curves)
    table = tables.scores(comparison)
    assert table.title == "text group: all tokens 80.0, no image 5.0"
    assert table.header == ["kept", "0.3", "0.5"]
    assert table.blocks == [
        [["selector", "60.0", "72.0"], ["random", "20.0", "40.0"], ["other", "—", "76.0"]],
        [
            ["selector, % of full", "75.0", "90.0"],
            ["random, % of full", "25.0", "50.0"],
            ["other, % of full", "—", "95.0"],
        ],
    ]


def test_the_tokens_of_a_question_are_told_once_for_reducers_with_equal_ones():
    def counted(keep, tokens, newlines):
        return replace(score(keep, 0.5), tokens=tokens, tokens_fed=tokens + newlines)

    ends = {"full": counted(1, 100.0, 12), "none": counted(0, 0, 0)}
    alike = (counted(0.3, 30.0, 12), counted(0.5, 50.0, 12))
    curves = {"selector": alike, "random": alike, "fastv": (counted(0.5, 50.0, 0),)}
    table = tables.tokens(Comparison("group", "text", curves=curves, **ends))
    assert table.title == "text group: visual tokens of a question, in all 100.0 (112.0 fed)"
    assert table.blocks == [
        [["selector, random", "30.0 (42.0 fed)", "50.0 (62.0 fed)"], ["fastv", "—", "50.0"]]
    ]


def compared():
    """A selector that wins, then ties, and another that was tried at one kept fraction."""
    ends = {"full": score(1, 0.8), "none": score(0, 0.05)}
    comparison = Comparison("group", "text", curves={}, **ends)
    others = {
        "random": {0.3: Difference(0.4, 0.3, 0.5), 0.5: Difference(0.02, -0.01, 0.05)},
        "other": {0.5: Difference(-0.041, -0.08, -0.002)},
    }
    return Versus(comparison, "selector", others)


def test_differences_are_in_points_with_their_interval():
    table = tables.differences(compared())
    assert table.header == ["kept", "0.3", "0.5"]
    assert table.blocks == [
        [
            ["selector minus random", "+40.0 [+30.0, +50.0]", "+2.0 [-1.0, +5.0]"],
            ["selector minus other", "—", "-4.1 [-8.0, -0.2]"],
        ]
    ]


def test_outcomes_are_named_and_counted():
    table = tables.outcomes(compared())
    assert table.blocks == [
        [["random", "win", "tie"], ["other", "—", "loss"]],
        [["win, count", "1", "0"], ["tie, count", "0", "1"], ["loss, count", "0", "1"]],
    ]


def test_matches_have_a_block_for_each_comparison_and_dashes_without_a_sibling():
    comparison = compared().comparison
    point = Score(keep=0.25, tokens=36.04, tokens_fed=48.04, mean=0.5, low=0.4, high=0.6)
    found = [
        Match(comparison, "selector_adaptive", point, 0.45, Difference(0.05, 0.01, 0.09)),
        Match(comparison, "prumerge_adaptive", point, None, None),
    ]
    fixed = {"selector": ["45.0", "+5.0 [+1.0, +9.0]", "win"], "prumerge": ["—", "—", "—"]}
    assert tables.matches(found).blocks == [
        [
            [f"text group: {name}-adaptive", "36.0 (48.0 fed)", "0.25", "50.0", *other]
            for name, other in fixed.items()
        ]
    ]


def measure(**changes):
    selections = {
        "selector": Selection([0.5, 0.25], [0.75, 0.5], [0.9, 1.0]),
        "random": Selection([0.6, 0.5], [0.6, 0.5], None),
    }
    overlap = Overlap(0.4, ["selector", "random"], [[1.0, 0.3], [0.3, 1.0]])
    made = Measure([0.3, 0.5], selections, overlap, Stability([0.3, 0.5], 3, [0.7, 0.8125]), {}, {}, {})
    return replace(made, **changes)


def test_both_reconstructions_have_a_block():
    assert tables.reconstruction(measure()).blocks == [
        [["selector", "0.500", "0.250"], ["random", "0.600", "0.500"]],
        [
            ["selector, by the reconstructor of random masks", "0.750", "0.500"],
            ["random, by the reconstructor of random masks", "0.600", "0.500"],
        ],
    ]


def test_coverage_and_stability_are_shown_where_they_are_known():
    table = tables.coverage(measure())
    assert table.title == "Written characters whose token is kept, %"
    assert table.blocks == [[["selector", "90.0", "100.0"]]]
    assert tables.coverage(measure(reducers={"random": measure().reducers["random"]})) is None
    table = tables.stability(measure())
    assert "over 3 training seeds" in table.title and table.blocks == [[["selector", "0.700", "0.812"]]]
    assert tables.stability(measure(stability=None)) is None


def test_the_net_gain_is_the_prefill_saved_less_the_time_of_the_selection():
    entries = [Spent("a", 144, 14, 32, 0.5), Spent("b", 144, 14, 1, 9.0), Spent("a", 144, 29, 1, 2.0)]
    prefill = [Prefill(144, 1, 20.0), Prefill(14, 1, 12.5), Prefill(144, 32, 4.0), Prefill(14, 32, 3.75)]
    table = tables.cost(Cost("a card", entries, prefill, {}, {}, {}))
    assert "a card" in table.title
    assert table.blocks == [
        [
            ["b", "1", "144", "14", "9.00", "7.50", "-1.50"],
            ["a", "1", "144", "29", "2.00", "—", "—"],
        ],
        [["a", "32", "144", "14", "0.50", "0.25", "-0.25"]],
    ]


def test_markdown_escapes_what_would_break_a_row():
    table = Table("t", ["a|b", "c"], [[["<b>", "1\n2"]], [["x", "y"]]])
    assert tables.markdown(table).split("\n") == [
        r"| a\|b | c |",
        "| --- | ---: |",
        "| &lt;b&gt; | 1 2 |",
        "| x | y |",
    ]


def test_a_parameter_with_two_values_has_two_rows_that_say_whose_they_are():
    one, two = ({"seed": seed, "part": {"keep": 0.3}} for seed in (0, 1))
    table = tables.parameters({"evaluate full": one, "evaluate random": one, "evaluate none": two})
    assert table.blocks == [
        [
            ["part.keep", "0.3", "evaluate"],
            ["seed", "0", "evaluate full, evaluate random"],
            ["seed", "1", "evaluate none"],
        ]
    ]


def test_provenance_has_a_row_for_each_stage():
    one = {"commit": "0123456789abcdef", "versions": {"atr": "1"}}
    two = {"commit": None, "versions": {"torch": "2"}}
    table = tables.provenance({"one": one, "two": two})
    assert table.header == ["stage", "commit", "atr", "torch"]
    assert table.blocks == [[["one", "0123456789ab", "1", "—"], ["two", "—", "—", "2"]]]


def test_pretraining_lists_what_was_measured(measured):
    assert ["validation/explained variance", "0.7866"] in tables.pretraining(measured).blocks[0]
