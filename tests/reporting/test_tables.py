from dataclasses import replace

import pytest

from atr.reporting import tables
from atr.reporting.cells import Provenance
from atr.reporting.intrinsic import IntrinsicCurves, IntrinsicResults, OverlapMatrix, Stability
from atr.reporting.latency import LatencyResults, PrefillTime, SelectionTime
from atr.reporting.paired import AdaptiveMatch, Difference, PairedDifferences
from atr.reporting.results import Comparison, ScorePoint
from atr.reporting.robustness import load_robustness
from atr.reporting.tables import Table


def score(keep, mean):
    return ScorePoint(keep=keep, tokens=10, tokens_fed=10, mean=mean, low=mean, high=mean)


def test_scores_are_in_percent_relative_to_full_and_to_the_others():
    curves = {
        "selector": (score(0.3, 0.6), replace(score(0.5, 0.72), low=0.7, high=0.755)),
        "random": (score(0.3, 0.2), score(0.5, 0.4)),
        "other": (score(0.5, 0.76),),
    }
    comparison = Comparison("group", "text", full=score(1, 0.8), none=score(0, 0.05), curves=curves)
    table = tables.score_table(comparison)
    assert table.title == "text group: score in % (all tokens 80.0, no image 5.0)"
    assert table.header == ["kept fraction", "0.3", "0.5"]
    assert table.blocks == [
        [["selector", "60.0", "72.0"], ["random", "20.0", "40.0"], ["other", "—", "76.0"]],
        [
            ["selector, % of full", "75.0", "90.0"],
            ["random, % of full", "25.0", "50.0"],
            ["other, % of full", "—", "95.0"],
        ],
        [
            ["selector, width of the 95 % interval", "0.0", "5.5"],
            ["random, width of the 95 % interval", "0.0", "0.0"],
        ],
    ]


def test_reducers_with_equal_tokens_share_a_row():
    def counted(keep, tokens, newlines):
        return replace(score(keep, 0.5), tokens=tokens, tokens_fed=tokens + newlines)

    ends = {"full": counted(1, 100.0, 12), "none": counted(0, 0, 0)}
    alike = (counted(0.3, 30.0, 12), counted(0.5, 50.0, 12))
    curves = {"selector": alike, "random": alike, "fastv": (counted(0.5, 50.0, 0),)}
    table = tables.token_table(Comparison("group", "text", curves=curves, **ends))
    assert table.title == "text group: visual tokens per question (all tokens 100.0 (112.0 fed))"
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
    return PairedDifferences(comparison, "selector", others)


def test_differences_are_in_points_with_their_interval():
    table = tables.difference_table(compared())
    assert table.header == ["kept fraction", "0.3", "0.5"]
    assert table.blocks == [
        [
            ["selector minus random", "+40.0 [+30.0, +50.0]", "+2.0 [-1.0, +5.0]"],
            ["selector minus other", "—", "-4.1 [-8.0, -0.2]"],
        ]
    ]


def test_outcomes_are_named_and_counted():
    table = tables.outcome_table(compared())
    assert table.blocks == [
        [["random", "win", "tie"], ["other", "—", "loss"]],
        [["win, total", "1", "0"], ["tie, total", "0", "1"], ["loss, total", "0", "1"]],
    ]


def test_matches_have_a_block_for_each_comparison_and_dashes_without_a_counterpart():
    comparison = compared().comparison
    point = ScorePoint(keep=0.25, tokens=36.04, tokens_fed=48.04, mean=0.5, low=0.4, high=0.6)
    found = [
        AdaptiveMatch(comparison, "selector_adaptive", point, 0.45, Difference(0.05, 0.01, 0.09)),
        AdaptiveMatch(comparison, "prumerge_adaptive", point, None, None),
    ]
    fixed = {"selector": ["45.0", "+5.0 [+1.0, +9.0]", "win"], "prumerge": ["—", "—", "—"]}
    assert tables.match_table(found).blocks == [
        [
            [f"text group: {name}_adaptive", "36.0 (48.0 fed)", "0.25", "50.0", *other]
            for name, other in fixed.items()
        ]
    ]


def intrinsic(**changes):
    selections = {
        "selector": IntrinsicCurves([0.5, 0.25], [0.75, 0.5], [0.9, 1.0]),
        "random": IntrinsicCurves([0.6, 0.5], [0.6, 0.5], None),
    }
    overlap = OverlapMatrix(0.4, ["selector", "random"], [[1.0, 0.3], [0.3, 1.0]])
    results = IntrinsicResults([0.3, 0.5], selections, overlap, Stability([0.3, 0.5], 3, [0.7, 0.8125]))
    return replace(results, **changes)


def test_both_reconstructions_have_a_block():
    assert tables.reconstruction_table(intrinsic()).blocks == [
        [["selector", "0.500", "0.250"], ["random", "0.600", "0.500"]],
        [
            ["selector, reconstructor of random masks", "0.750", "0.500"],
            ["random, reconstructor of random masks", "0.600", "0.500"],
        ],
    ]


def test_coverage_and_stability_are_shown_if_they_were_measured():
    table = tables.coverage_table(intrinsic())
    assert table.title == "Written characters whose token is kept, %"
    assert table.blocks == [[["selector", "90.0", "100.0"]]]
    assert tables.coverage_table(intrinsic(reducers={"random": intrinsic().reducers["random"]})) is None
    table = tables.stability_table(intrinsic())
    assert "selectors of 3 training seeds" in table.title and table.blocks == [
        [["selector", "0.700", "0.812"]]
    ]
    assert tables.stability_table(intrinsic(stability=None)) is None


def test_the_net_gain_is_the_prefill_saved_less_the_time_of_the_selection():
    entries = [
        SelectionTime("a", 144, 14, 32, 0.5),
        SelectionTime("b", 144, 14, 1, 9.0),
        SelectionTime("a", 144, 29, 1, 2.0),
    ]
    prefill = [
        PrefillTime(144, 1, 20.0),
        PrefillTime(14, 1, 12.5),
        PrefillTime(144, 32, 4.0),
        PrefillTime(14, 32, 3.75),
    ]
    table = tables.latency_table(LatencyResults("a card", entries, prefill))
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
    assert tables.markdown_table(table).split("\n") == [
        r"| a\|b | c |",
        "| --- | ---: |",
        "| &lt;b&gt; | 1 2 |",
        "| x | y |",
    ]


def test_a_parameter_with_two_values_has_two_rows_that_say_whose_they_are():
    one, two = ({"seed": seed, "part": {"keep": 0.3}} for seed in (0, 1))
    table = tables.parameter_table({"evaluate full": one, "evaluate random": one, "evaluate none": two})
    assert table.blocks == [
        [
            ["part.keep", "0.3", "evaluate"],
            ["seed", "0", "evaluate full, evaluate random"],
            ["seed", "1", "evaluate none"],
        ]
    ]


def test_stages_whose_runs_are_alike_share_the_name_of_the_stage():
    one, two = ({"keep": keep} for keep in (0.3, 0.5))
    table = tables.parameter_table({"pretrain": two, "evaluate full": one, "evaluate random": one})
    assert table.blocks == [[["keep", "0.3", "evaluate"], ["keep", "0.5", "pretrain"]]]


def test_provenance_has_a_row_for_each_stage_and_for_each_run_that_differs():
    one, two = Provenance("0123456789abcdef", {"atr": "1"}), Provenance(None, {"torch": "2"})
    table = tables.provenance_table({"one": one, "evaluate full": two, "evaluate none": two})
    assert table.header == ["stage", "commit", "atr", "torch"]
    assert table.blocks == [[["one", "0123456789ab", "1", "—"], ["evaluate", "—", "—", "2"]]]
    table = tables.provenance_table({"evaluate full": one, "evaluate none": two})
    assert table.blocks == [[["evaluate full", "0123456789ab", "1", "—"], ["evaluate none", "—", "—", "2"]]]


@pytest.fixture
def robustness(synthetic, tmp_path):
    names = ("distilled", "selector")
    synthetic.write_robustness(tmp_path, names)
    return lambda *others: load_robustness(tmp_path, (*others, *names))


def test_robustness_has_a_row_a_deployment_and_a_column_a_reducer_and_fraction(robustness):
    overlap, photographs, points = tables.robustness_tables(robustness("full"))
    columns = ["distilled 0.3", "distilled 0.5", "selector 0.3", "selector 0.5"]
    assert overlap.header == photographs.header == ["deployment", *columns]
    assert overlap.blocks == [
        [["JPEG 75", *["0.900 (0.75)", "—"] * 2], ["bilinear", *[tables.NO_PIXEL_CHANGED] * 4]],
    ]
    assert photographs.blocks[0][1] == ["bilinear", *["0.800 (0.50)"] * 4]
    assert points.header == ["deployment", "all tokens", *columns]
    assert points.blocks[0] == [["reference, %", "95.0", *["90.0", "92.5"] * 2]]
    assert points.blocks[1][0] == ["JPEG 75", "+0.0 [+0.0, +0.0]", *["-1.2 [-5.0, +2.5]"] * 4]


def test_without_full_robustness_has_no_column_of_all_tokens(robustness):
    points = tables.robustness_tables(robustness())[-1]
    assert points.header == ["deployment", "distilled 0.3", "distilled 0.5", "selector 0.3", "selector 0.5"]
    assert points.blocks[0] == [["reference, %", *["90.0", "92.5"] * 2]]
    assert points.blocks[1][0] == ["JPEG 75", *["-1.2 [-5.0, +2.5]"] * 4]


def test_pretraining_lists_its_final_metrics(measured):
    assert ["validation/explained variance", "0.7866"] in tables.pretraining_table(
        measured.pretraining
    ).blocks[0]
