import io
from dataclasses import replace

from PIL import Image

from atr.reporting import report


def test_there_is_a_curve_for_each_benchmark_and_group_and_pages_where_masks_are(built, synthetic):
    assert [picture.name for picture in built.pictures] == [
        "groups",
        "group-text",
        "group-general",
        "differences-text",
        "differences-general",
        *(f"benchmark-{name}" for name in synthetic.GROUPS),
        "pages-docs",
        "pages-signs",
        "examples",
        "components",
    ]
    for picture in built.pictures:
        Image.open(io.BytesIO(picture.png)).verify()


def test_the_picture_of_the_encoder_is_shown_as_it_was_drawn(built, synthetic):
    assert built.components.png == synthetic.picture()
    assert "encoder micro" in built.components.caption


def test_examples_show_both_ways_and_say_how_they_were_chosen(built, synthetic):
    outcomes = {card.case.outcome for card in built.cards}
    assert outcomes == {(True, False), (False, True)}
    assert "50 % of them kept" in built.examples_note
    assert Image.open(io.BytesIO(built.cards[0].png)).size == (168, 168)


def test_where_nothing_differs_the_report_says_so(measured, synthetic):
    same = {name: measured.evaluations[name] for name in ("full", "none", "selector")}
    random = replace(measured.evaluations["random"], rows=measured.evaluations["selector"].rows)
    agreeing = replace(measured, evaluations={**same, "random": random})
    drawn = report.build(agreeing, synthetic.image, synthetic.SETTINGS, synthetic.picture())
    assert (drawn.examples, drawn.cards, drawn.examples_note) == (None, [], report.NO_EXAMPLES)


def test_the_report_says_how_many_questions_could_not_be_answered(measured, built, synthetic):
    full = measured.evaluations["full"]
    rows = [replace(full.rows[0], score=None, prediction=""), *full.rows[1:]]
    spoilt = replace(measured, evaluations=measured.evaluations | {"full": replace(full, rows=rows)})
    assert "1 of them could not be answered" in report._subtitle(spoilt)
    assert "could not be answered" not in built.subtitle


def test_pages_show_the_best_reducer_as_well_where_it_keeps_tokens(measured, synthetic):
    keeping = replace(measured.evaluations["selector"], reducer="best")
    for best, shown in (
        (keeping, "random, selector, best;"),
        (replace(keeping, masks=None), "random, selector;"),
    ):
        results = replace(measured, evaluations=measured.evaluations | {"best": best})
        pages = report._pages(results, synthetic.image, synthetic.SETTINGS | {"best": "best"})
        assert [f"kept by {shown}" in page.caption for page in pages] == [True, True]


def test_the_best_reducer_is_compared_with_every_other_one(everything):
    names = [row[0] for row in everything.compared.tables[0].blocks[0]]
    assert names == ["selector", "random", *(f"peer-{number:02d}" for number in range(1, 18))]
    assert everything.headlines[2].startswith("On the text group, peer-00 wins against ")
    assert {row[0] for row in everything.scores[1].blocks[0]} == {f"peer-00 minus {name}" for name in names}
    adaptive = [row[0] for block in everything.compared.matches.blocks for row in block]
    assert adaptive[:2] == ["text group: peer-03-adaptive", "text group: selector-adaptive"]
    assert len(adaptive) == 2 * 8


def test_what_was_measured_beside_the_answers_is_in_provenance_but_no_time_is_in_the_numbers(everything):
    stages = [row[0] for row in everything.provenance.blocks[0]]
    assert stages[-3:] == ["measure", "cost", "robustness"]
    assert ["cost.repeats", "5", "cost"] in everything.parameters.blocks[0]
    assert set(everything.numbers) == {"text", "general", "differences", "adaptive", "measure", "overlap"}


def test_provenance_and_parameters_name_every_stage(built):
    stages = [row[0] for row in built.provenance.blocks[0]]
    assert stages == ["pretrain", "evaluate full", "evaluate none", "evaluate random", "evaluate selector"]
    assert ["report.pages", "3", "report"] in built.parameters.blocks[0]
    assert ["pretrain.keep", "0.3", "pretrain"] in built.parameters.blocks[0]


def test_a_reducer_of_fewer_budgets_is_compared_at_those_alone(measured, synthetic):
    whole = measured.evaluations["selector"]
    curves = {
        name: tuple(score for score in curve if score.keep >= 0.7) for name, curve in whole.curves.items()
    }
    rows = [row for row in whole.rows if row.keep >= 0.7]
    short = replace(whole, reducer="fastv", curves=curves, rows=rows)
    joined = replace(measured, evaluations=measured.evaluations | {"fastv": short})
    made = report.build(joined, synthetic.image, synthetic.SETTINGS, synthetic.picture())
    lines = {row[0]: row[1:] for table in made.scores[:2] for block in table.blocks for row in block}
    assert lines["fastv"] == ["—"] * 6 + lines["selector"][6:]
    assert lines["selector minus fastv"] == ["—"] * 6 + ["+0.0 [+0.0, +0.0]"] * 3
    outcomes = {row[0]: row[1:] for row in made.compared.tables[0].blocks[0]}
    assert outcomes["fastv"] == ["—"] * 6 + ["tie"] * 3
    told = made.numbers["differences"]
    assert [keep for keep in told if "selector minus fastv" in told[keep]["text"]] == ["0.7", "0.8", "0.9"]
