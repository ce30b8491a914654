import io
import json
import re
import warnings
from dataclasses import replace

import pytest
from PIL import Image

from atr.reporting import captions, report, sections
from atr.reporting.headlines import subtitle
from atr.reporting.html import render_html
from atr.reporting.markdown import render_markdown


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
    content = report.build_report(agreeing, synthetic.image, synthetic.SETTINGS, synthetic.picture())
    assert (content.examples, content.cards, content.examples_note) == (None, [], captions.NO_EXAMPLES)


def test_the_report_says_how_many_questions_could_not_be_answered(measured, built, synthetic):
    full = measured.evaluations["full"]
    rows = [replace(full.rows[0], score=None, prediction=""), *full.rows[1:]]
    spoilt = replace(measured, evaluations=measured.evaluations | {"full": replace(full, rows=rows)})
    assert "1 of them could not be answered" in subtitle(spoilt)
    assert "could not be answered" not in built.subtitle


def test_the_subtitle_names_precision_inputs_and_machines(measured, built):
    said = "Answered in 32-true with sdpa attention on "
    assert built.subtitle.endswith(said + "cpu (x86_64, AVX2), from features in 32-true on cpu.")
    full, random = (measured.evaluations[name] for name in ("full", "random"))
    elsewhere = replace(random, resolved=random.resolved | {"device": "cuda", "processor": "NVIDIA H200"})
    mixed = replace(measured, evaluations=measured.evaluations | {"random": elsewhere})
    machines = "cpu (x86_64, AVX2): full, none, selector; cuda (NVIDIA H200): random"
    assert f"{said}several machines, {machines}, from features in" in subtitle(mixed)
    whole = replace(full, resolved=full.resolved | {"features": None})
    unstored = replace(measured, evaluations=measured.evaluations | {"full": whole})
    assert subtitle(unstored).endswith(f"{said}cpu (x86_64, AVX2), from the images.")


def test_resolved_values_are_among_the_parameters_by_stage(measured, synthetic):
    random = measured.evaluations["random"]
    elsewhere = replace(random, resolved=random.resolved | {"device": "cuda"})
    mixed = replace(measured, evaluations=measured.evaluations | {"random": elsewhere})
    [rows] = report.build_report(
        mixed, synthetic.image, synthetic.SETTINGS, synthetic.picture()
    ).parameters.blocks
    assert ["resolved.precision", "32-true", "pretrain, evaluate"] in rows
    assert ["resolved.device", "cuda", "evaluate random"] in rows


def test_the_tokens_of_each_group_are_shown(built):
    shown = [table for table in built.scores if "visual tokens per question" in table.title]
    assert [table.title.split(":")[0] for table in shown] == ["text group", "general group"]
    kept = [f"{round(144 * keep / 10):.1f}" for keep in range(1, 10)]
    assert shown[0].blocks == [[["selector, random", *kept]]]


def test_pages_show_the_best_reducer_as_well_where_it_keeps_tokens(measured, synthetic):
    keeping = replace(measured.evaluations["selector"], reducer="distilled")
    for best, shown in (
        (keeping, "random, selector, distilled."),
        (replace(keeping, masks=None), "random, selector."),
    ):
        results = replace(measured, evaluations=measured.evaluations | {"distilled": best})
        pages = sections.page_pictures(results, synthetic.image, synthetic.SETTINGS | {"best": "distilled"})
        assert [f"kept by {shown}" in page.caption for page in pages] == [True, True]


def test_the_best_reducer_is_compared_with_every_other_one(everything, peers):
    names = [row[0] for row in everything.differences.tables[0].blocks[0]]
    assert names == ["selector", "random", *peers[1:]]
    assert everything.headlines[2].startswith(
        "On the text group, at kept fraction 0.5, average_pooling wins against "
    )
    assert {row[0] for row in everything.scores[1].blocks[0]} == {
        f"average_pooling minus {name}" for name in names
    }
    adaptive = [row[0] for block in everything.differences.matches.blocks for row in block]
    assert adaptive[:2] == ["text group: prumerge_adaptive", "text group: selector_adaptive"]
    assert len(adaptive) == 2 * 8


def test_other_measurements_are_in_provenance_but_no_time_is_in_the_numbers(everything):
    stages = [row[0] for row in everything.provenance.blocks[0]]
    assert stages == ["pretrain", "evaluate", "intrinsic", "latency", "prefill", "robustness"]
    assert ["latency.seconds", "5", "latency"] in everything.parameters.blocks[0]
    assert set(everything.numbers) == {"text", "general", "differences", "adaptive", "intrinsic", "overlap"}


def test_provenance_and_parameters_name_every_stage(built):
    stages = [row[0] for row in built.provenance.blocks[0]]
    assert stages == ["pretrain", "evaluate"]
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
    content = report.build_report(joined, synthetic.image, synthetic.SETTINGS, synthetic.picture())
    lines = {row[0]: row[1:] for table in content.scores[:2] for block in table.blocks for row in block}
    assert lines["fastv"] == ["—"] * 6 + lines["selector"][6:]
    assert lines["selector minus fastv"] == ["—"] * 6 + ["+0.0 [+0.0, +0.0]"] * 3
    outcomes = {row[0]: row[1:] for row in content.differences.tables[0].blocks[0]}
    assert outcomes["fastv"] == ["—"] * 6 + ["tie"] * 3
    told = content.numbers["differences"]
    assert [keep for keep in told if "selector minus fastv" in told[keep]["text"]] == ["0.7", "0.8", "0.9"]


OPTIONAL = ("none", "random", "distilled", "selector_adaptive", "tome")


@pytest.fixture(scope="module")
def many(synthetic, tmp_path_factory):
    """Results of every reducer of the lists below."""
    return synthetic.write(tmp_path_factory.mktemp("many"), 6, ("full", "selector", *OPTIONAL))


@pytest.mark.parametrize(
    ("best", "left_out"),
    [
        ("random", set()),
        ("distilled", {"none"}),
        ("selector", {"random"}),
        ("distilled", {"none", "random"}),
        ("selector", set(OPTIONAL) - {"distilled"}),
    ],
)
def test_whatever_reducers_the_parameters_allow_there_is_a_report(many, load, synthetic, best, left_out):
    """The lines and pictures of a reducer that was not evaluated are left out, and nothing else."""
    results = load(many, ["full", "selector", *(name for name in OPTIONAL if name not in left_out)])
    content = report.build_report(
        results, synthetic.image, synthetic.SETTINGS | {"best": best}, synthetic.picture()
    )
    pages = render_html(content) + render_markdown(content)
    assert (content.agreement is None) == ("random" in left_out)
    assert (content.examples_note == captions.NO_RANDOM) == ("random" in left_out)
    assert ("no image" in content.scores[0].title) == ("none" not in left_out)
    assert ("random selection (" in pages) == ("random" not in left_out)
    assert set(content.metrics["text"]) >= {"full", "selector@.3", f"{best}@.5"}
    for name in left_out - {"none", "random"}:
        assert f">{name}<" not in pages
    assert {"none", "random"} - set(content.numbers["text"]) >= left_out & {"none"}


def test_the_selector_alone_has_a_report_though_there_is_nothing_to_compare_it_with(load, many, synthetic):
    content = report.build_report(
        load(many, ["full", "selector"]), synthetic.image, synthetic.SETTINGS, synthetic.picture()
    )
    assert content.differences.pictures == [] == content.differences.tables
    assert render_markdown(content) and render_html(content)


def test_a_best_reducer_that_cannot_keep_half_is_compared_where_it_can(many, load, synthetic):
    results = load(many, ["full", "selector", "random", "distilled"])
    whole = results.evaluations["distilled"]
    curves = {name: tuple(each for each in curve if each.keep >= 0.7) for name, curve in whole.curves.items()}
    short = replace(whole, curves=curves, rows=[row for row in whole.rows if row.keep >= 0.7])
    results = replace(results, evaluations=results.evaluations | {"distilled": short})
    settings = synthetic.SETTINGS | {"best": "distilled"}
    content = report.build_report(results, synthetic.image, settings, synthetic.picture())
    assert content.differences.tables[0].header == ["kept fraction", "0.7", "0.8", "0.9"]
    assert not any("distilled wins" in line and " at 0.5" in line for line in content.headlines)
    assert "distilled@.5" not in content.metrics["text"]


ANSWERS = [
    r"$\frac$",
    "$x^2$ costs $5",
    r"\alpha_{",
    "a" * 10_000,
    "word " * 2_000,
    "\x00\x07\x1b[31mred\x1b[0m\x7f",
    "one\ntwo\r\nthree\tfour\x0b\x0c\x85\u2028five",
    "\u202egnp.exe\u202c \u2066x\u2069 \u200f",
    "\ufdd0\uffff\U0010ffff\ue000",
    "\u6f22\u5b57 \u0627\u0644\u0639\u0631 \u0e44\u0e17\u0e22 \U0001f469\u200d\U0001f680",
    "Z\u0351\u036b\u0343" * 50,
    "<script>document.title = 'attacked'</script>",
    "| a | b |\n|---|---|",
    "![x](http://127.0.0.1/x.png) [y](javascript:alert(1))",
    "{{ 7 * 7 }} {% raw %}",
    "",
    "   ",
    "%s %(x)s {0}",
]
"""Texts that a model may answer or a dataset may ask."""


@pytest.fixture(scope="module")
def hostile(synthetic, load, tmp_path_factory):
    """Results whose texts are ANSWERS by turns, under an encoder of a hostile name."""
    folder = synthetic.write(tmp_path_factory.mktemp("hostile"), 40)
    for path in folder.glob("evaluate/*/results.jsonl"):
        lines = synthetic.read_lines(path)
        for place, line in enumerate(lines):
            text = ANSWERS[int(line["answers"][0]) % len(ANSWERS)]
            predictions = [ANSWERS[(place + at) % len(ANSWERS)] for at in range(len(line["keep"]))]
            line |= {"question": text, "answers": [text], "prediction": predictions}
        synthetic.write_lines(path, lines)
    for path in folder.glob("evaluate/*/summary.json"):
        content = json.loads(path.read_text())
        content["encoder"] = f"x<b>|\x07{ANSWERS[-5]}"
        path.write_text(json.dumps(content))
    return load(folder)


def test_any_question_and_answer_is_shown_as_text(hostile, synthetic):
    settings = synthetic.SETTINGS | {"examples": 60}
    with warnings.catch_warnings(action="error"):
        content = report.build_report(hostile, synthetic.image, settings, synthetic.picture())
    assert len(content.cards) > len(ANSWERS)
    width, height = Image.open(io.BytesIO(content.examples.png)).size
    assert width < 2000 and height < 1000 * len(content.cards) / 3 + 1000, "no answer stretches the picture"
    page, text = render_html(content), render_markdown(content)
    for shown in (page, text):
        assert shown.encode(), "no lone surrogate"
        lines = shown.replace("\N{NO-BREAK SPACE}", " ").split("\n")
        assert all(line.isprintable() for line in lines)
    shown = re.sub(r"base64,[^\"]*", "", page)
    assert "<script" not in shown and "a" * 301 not in shown and "word " * 61 not in shown
    assert "\\x07\\x1b[31mred" in shown and "\\u202egnp.exe" in shown
    assert "{{ 7 * 7 }} {% raw %}" in shown and "(no answer)" in shown
    assert "<b>" not in text and "](http" not in text
