from atr.reporting import tables
from atr.reporting.results import Comparison, Score
from atr.reporting.tables import Table


def score(keep, mean):
    return Score(keep=keep, tokens=10, mean=mean, low=mean, high=mean)


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
        [["selector minus random", "+40.0", "+32.0"], ["selector minus other", "—", "-4.0"]],
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
