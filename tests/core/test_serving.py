"""What a reducer needs against what a family gives, from constants alone."""

import runpy
from pathlib import Path

import pytest

from atr.core import catalog, serving

ROOT = Path(__file__).parents[2]
LLAVA = ("llava", "llava_next", "llava_next_video", "llava_onevision")


def test_every_family_is_of_a_kind():
    assert set(serving.FAMILIES.values()) == set(serving.FAMILY_KINDS)
    assert set(serving.SEVERAL_LAYERS) | set(serving.observed_types()) <= set(serving.FAMILIES)


def test_llava_is_served_by_all_and_with_tiles_by_those_that_take_tiles():
    assert serving.serving_reducers("llava") == catalog.reducers()
    for family in LLAVA[1:]:
        refused = set(catalog.reducers()) - set(serving.serving_reducers(family))
        assert refused == {name for name in catalog.reducers() if catalog.reducer_traits(name).one_tile}


@pytest.mark.parametrize("family", serving.FAMILIES)
def test_every_family_has_baselines_selectors_and_diversity(family):
    served = {"full", "none", "random", "l2_norm", "divprune", "cdpruner_text", "selector", "distilled"}
    assert served <= set(serving.serving_reducers(family))


@pytest.mark.parametrize(
    ("reducer", "family", "reason"),
    [
        ("fastv", "qwen2_5_vl",
         "prunes inside the language model, which qwen2_5_vl does not serve"),
        ("image_downsampling", "gemma3", "needs encode, which gemma3 does not serve"),
        ("pixel_variance", "internvl", "needs pixels_BCHW, which internvl does not serve"),
        ("tome", "internvl", "cannot serve internvl, which cuts images into tiles"),
        ("tome", "qwen3_vl",
         "merges tokens of one layer, and qwen3_vl feeds its language model those of several"),
        ("class_attention", "got_ocr2",
         "needs attention_BN, which the tower of got_ocr2 does not give"),
        ("dart", "gemma4_unified",
         "needs keys_BND, which the tower of gemma4_unified does not give"),
        ("hired", "internvl",
         "splits its budget by a first tile of the whole image, which internvl does not have"),
    ],
)  # fmt: skip
def test_a_reducer_that_a_family_does_not_serve_has_a_reason(reducer, family, reason):
    assert serving.serves(reducer, family) == reason
    assert reducer not in serving.serving_reducers(family)


@pytest.mark.parametrize(
    ("reducer", "family"),
    [
        ("tome", "qwen2_5_vl"), ("visionzip", "mistral3"), ("hired", "qwen2_5_vl"), ("uniform", "qwen3_vl"),
        ("class_attention", "internvl"), ("fastv", "llava_next"), ("average_pooling", "gemma4_unified"),
    ],
)  # fmt: skip
def test_what_is_served_has_no_reason(reducer, family):
    assert serving.serves(reducer, family) == ""


def test_where_the_processor_is_known_it_says_whether_images_are_cut():
    assert serving.serves("tome", "internvl", is_cut=False) == serving.serves("tome", "my_llava") == ""
    assert (
        serving.serves("tome", "my_llava", is_cut=True)
        == "cannot serve my_llava, which cuts images into tiles"
    )
    assert set(serving.serving_reducers("qwen2_5_vl", is_cut=True)) < set(
        serving.serving_reducers("qwen2_5_vl")
    )


def test_a_users_reducer_is_judged_by_its_constants_and_a_users_family_by_nothing(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text('NEEDS = ("keys_BND",)\n')
    (tmp_path / "silent.py").write_text("")
    monkeypatch.chdir(tmp_path)
    assert serving.serves("mine", "got_ocr2").startswith("needs keys_BND")
    assert serving.serves("silent", "got_ocr2") == serving.serves("mine", "my_llava") == ""
    with pytest.raises(ValueError, match=r"^nothing\.py: no such file$"):
        serving.serves("nothing", "llava")


def test_the_table_of_the_docs_is_that_of_the_code():
    script = runpy.run_path(str(ROOT / "docs/serving_table.py"))
    page = (ROOT / "docs/peers.md").read_text()
    assert page.partition(script["START"])[2].partition("\n" + script["END"])[0].splitlines() == list(
        script["lines"]()
    )
