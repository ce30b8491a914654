"""The model card that is saved and pushed with a selector."""

import html
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from atr.reduction import FeatureSelector

FACTS = {
    "data": "coco",
    "images": 100000,
    "seed": 7,
    "positions": "original",
    "fingerprint": "0f" * 32,
    "scores": {"kept": 0.30214, "explained_variance": 0.78664},
}


def selector(**change):
    return FeatureSelector(
        **{"width": 16, "grid": (3, 4), "heads": 2, "encoder": "clip-vit", "layer": -2, "keep": 0.3} | change
    )


def noted(**change):
    made = selector(**change)
    made.note(**FACTS)
    return made


def rows(page):
    return dict(re.findall(r"^\| (.+?) \| (.+) \|$", page, flags=re.MULTILINE))


def test_the_card_describes_the_selector_and_its_training(tmp_path):
    noted().save_pretrained(tmp_path)
    page = (tmp_path / "README.md").read_text()
    table = rows(page)
    assert table == {
        "encoder": "clip-vit",
        "layer": "-2",
        "grid": "3 x 4 tokens",
        "width of a feature": "16",
        "transformer layers": "3",
        "kept proportion p in training": "0.3",
        "positions of the kept tokens": "original",
        "training data": "coco",
        "training images": "100000",
        "seed": "7",
        "fingerprint of the encoder": "0f" * 32,
        "kept": "0.3021",
        "explained&#95;variance": "0.7866",
    }
    assert "https://arxiv.org/abs/2503.16660" in page and "FeatureSelector.from_pretrained(" in page
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.license, data.library_name) == ("apache-2.0", "atr")


def test_unknown_facts_are_left_out():
    page = selector(encoder=None, layer=None, keep=None).generate_model_card().content
    assert set(rows(page)) == {"grid", "width of a feature", "transformer layers"}
    assert "None" not in page and "Measured" not in page


def test_the_table_and_its_rule_stand_together():
    page = noted().generate_model_card().content
    assert "| | |\n|---|---|\n| encoder | clip-vit |\n| layer | -2 |\n" in page
    assert "\n\n| | |\n|---|---:|\n| explained&#95;variance | 0.7866 |\n| kept | 0.3021 |\n\n" in page


def test_a_loaded_selector_is_pushed_with_the_same_card(tmp_path, monkeypatch):
    noted().save_pretrained(tmp_path)
    pushed = {}

    class Hub:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, **options):
            return type("Repository", (), {"repo_id": repo_id})

        def upload_folder(self, folder_path, **options):
            pushed.update({path.name: path.read_bytes() for path in Path(folder_path).iterdir()})

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Hub)
    loaded = FeatureSelector.from_pretrained(tmp_path)
    assert loaded.record == FACTS
    loaded.push_to_hub("someone/selector")
    assert pushed == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


@pytest.mark.parametrize(
    "text",
    [
        "a|b",
        "<script>alert(1)</script>",
        "[here](http://evil)",
        "![x](y)",
        "`code`",
        "**bold** _or_ ~not~",
        "{{ 7 * 7 }}{% raw %}",
        "&amp;",
        "back\\slash",
        "two\nlines\r\n---\n# title",
    ],
)
def test_text_is_escaped(text):
    page = noted(encoder=text).generate_model_card()
    plain = noted(encoder="E").generate_model_card()
    shown = rows(page.content)["encoder"]
    assert not re.search(r"[^\w\s.,/+&#;-]", shown)
    assert html.unescape(shown) == " ".join(text.split())
    assert page.content.replace(shown, "E") == plain.content
