"""`atr families`, and the page that is its output."""

from importlib.metadata import version
from pathlib import Path

import pytest
import transformers
from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from atr.cli import families
from atr.cli.main import main
from atr.vlm.families import checked, summary, supported_types
from atr.vlm.families.summary import PROVEN_IN, built_in_types, find_others, summarise_family

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """No type is proven on this machine alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def lines():
    return (ROOT / "docs/families.md").read_text().splitlines()


@pytest.mark.exhaustive
def test_the_page_is_the_output_of_the_command(capsys):
    main(["families", "--markdown"])
    printed = capsys.readouterr().out
    assert (ROOT / "docs/families.md").read_text() == printed, "atr families --markdown > docs/families.md"


def test_the_page_has_a_row_of_each_type():
    rows = [line.split(" | ")[0].removeprefix("| ") for line in lines() if line.startswith("| ")]
    assert rows[2:] == built_in_types(), "atr families --markdown > docs/families.md"
    assert max(len(line) for line in lines() if not line.startswith("|")) <= 110


@pytest.mark.parametrize("model_type", ["llava_next", "qwen2_5_vl", "qwen3_vl", "gemma3", "smolvlm"])
def test_rows_of_the_page_are_up_to_date(model_type, monkeypatch):
    monkeypatch.setattr(families, "built_in_types", lambda: [model_type])
    (row,) = [line for line in families.page().splitlines() if line.startswith(f"| {model_type} ")]
    assert row in lines(), "atr families --markdown > docs/families.md"


def test_the_terminal_has_the_same_rows(monkeypatch, capsys):
    monkeypatch.setattr(families, "supported_types", lambda: ["llava", "qwen2_5_vl"])
    main(["families"])
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split("  ")[0] == "model type" and len(rows) == 2
    assert rows[1].split("  ")[0] == "qwen2_5_vl" and rows[1].endswith(f"  {PROVEN_IN}")
    assert rows[0].index(PROVEN_IN) == rows[1].index(PROVEN_IN) == head.index("proven in"), "in columns"


@pytest.mark.parametrize(
    ("model_type", "patches", "layout", "needs", "scores"),
    [
        ("llava", "1", "one square grid", "", "attention, keys, pixels"),
        ("llava_next", "1", "square tiles, newlines", "", "attention, keys, pixels"),
        ("gemma3", "16", "one square grid", "token_type_ids", None),
        ("internvl", "4", "square tiles", "", None),
        ("smolvlm", "4", "square tiles, tags that go with the run after them", "", None),
        ("mistral3", "4", "a grid of the image's shape, tags that go with the run before them", "", None),
        (
            "qwen2_5_vl", "4", "a grid of the image's shape, positions by row and column",
            "mm_token_type_ids", None,
        ),
    ],
)  # fmt: skip
def test_a_summary_says_what_the_family_is(model_type, patches, layout, needs, scores):
    found = summarise_family(model_type)
    assert (found.patches, found.layout, found.needs) == (patches, layout, needs)
    assert scores is None or found.scores == scores
    assert found.proven == PROVEN_IN


@pytest.mark.parametrize(
    ("model_type", "removed"),
    [
        ("qwen2_5_vl", "yes"),
        ("gemma3", "in prompts within its sliding_window of 4096"),
        ("lfm2_vl", "no: conv layers mix neighbouring tokens"),
        ("qwen3_5", "no: linear_attention layers mix neighbouring tokens"),
    ],
)
def test_where_removing_is_not_masking_the_default_configuration_says_so(model_type, removed):
    assert summarise_family(model_type).removed == removed


@pytest.mark.parametrize(
    ("model_type", "refused"),
    [("qwen3_vl", "merging reducers"), ("exaone4_5", "videos, original positions"), ("llava", "videos")],
)
def test_what_a_family_refuses_is_named(model_type, refused):
    assert summarise_family(model_type).refused == refused


def test_the_tests_prove_the_types_with_the_pinned_version():
    assert f"\ntransformers=={PROVEN_IN}\n" in (ROOT / "constraints.txt").read_text()


def test_another_version_is_not_called_proven(monkeypatch):
    monkeypatch.setattr(summary, "version", lambda name: "9.1.0")
    assert summarise_family("llava").proven == f"{PROVEN_IN}, not 9.1.0"


def test_a_type_that_was_checked_here_is_listed(monkeypatch):
    checked.record_checked("qwen2_5_vl")
    monkeypatch.setattr(families, "supported_types", list)
    _, row = families.family_lines()
    assert row.endswith(f"{version('transformers')}, by check-family")


def test_a_users_family_without_a_tiny_copy_is_listed_by_name(monkeypatch):
    monkeypatch.setattr(summary, "built_in_types", lambda: ["llava"])
    found = summarise_family("my_llava")
    assert (found.model_type, found.proven, found.patches, found.layout) == ("my_llava", "no", "?", "?")


@pytest.mark.exhaustive
def test_other_types_are_sorted_by_the_signature_of_forward():
    """The source says what the classes say that it defines, all of which are imported here."""
    from inspect import signature

    others = find_others(supported_types())
    classes = {config.model_type: kind for config, kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.items()}
    for names, has in ((others.untried, True), (others.without, False)):
        for name in set(names) & set(classes):
            assert ("mm_encoder_outputs" in signature(classes[name].forward).parameters) == has, name


def test_every_type_of_transformers_is_on_the_page_once():
    others = find_others(supported_types())
    names = transformers.models.auto.modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    listed = [*supported_types(), *others.untried, *others.without]
    assert len(listed) == len(set(listed)) and set(names) <= set(listed)
    assert {"mllama", "git", "kosmos-2"} <= set(others.without)
