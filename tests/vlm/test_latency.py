"""What is timed and how times add up, on a clock of our own: the numbers of a machine prove nothing."""

import runpy
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from atr.core import catalog
from atr.core.serving import serves
from atr.core.tokens import budget
from atr.reduction import FeatureSelector, SelectorReducer
from atr.reduction.peers.random import Random
from atr.reduction.registry import build_reducer
from atr.vlm import latency
from atr.vlm.checkpoint import load_vlm
from atr.vlm.families.tiny import TINY_TYPES, tiny_config, tiny_model

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Attentive:
    """Keeps the most attended tokens; looks at whatever else there can be."""

    needs: ClassVar[frozenset[str]] = frozenset({"attention_BN", "pixels_BCHW", "projected_BND", "text_BD"})

    def __call__(self, encoded, budget):
        assert len(encoded.text_BD) == len(encoded.pixels_BCHW) == len(encoded.attention_BN)
        assert encoded.text_BD.shape[1] == encoded.projected_BND.shape[2]
        torch.testing.assert_close(encoded.text_BD.norm(dim=1), torch.ones(len(encoded.text_BD)))
        return encoded.attention_BN.topk(budget).indices.sort().values


@pytest.fixture
def clock(monkeypatch):
    """One millisecond for every selection, 10 for a forward of the tower, 14 for one with attention."""
    ran = []

    def read(run, seconds):
        result = run()
        ran.append((run.func, result))
        if run.func.__name__ == "encode":
            return 14.0 if run.args[0] else 10.0
        return 1.0

    monkeypatch.setattr(latency, "milliseconds", read)
    return ran


@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_onevision"])
def test_attention_is_paid_for_by_those_who_need_it(make_model, clock):
    images = latency.make_noise(make_model(), None, 3, 0)
    for reducer, spent in ((Random(), 1), (Attentive(), 1 + 4)):
        entries = list(latency.time_selection(images, reducer, [0.25, 0.5], 0.1))
        assert [tuple(entry.values()) for entry in entries] == [
            (16, kept, 3, pytest.approx(spent / 3)) for kept in (budget(0.25, 16), budget(0.5, 16))
        ]
    kept = [result for run, result in clock if run.__name__ == "select"]
    assert [keep_BK.shape for keep_BK in kept] == [(3, 4), (3, 8)] * 2
    assert sum(run.__name__ == "encode" for run, _ in clock) == 2  # once with, once without


@pytest.mark.parametrize("with_attention, extra", [(14.0, 4.0), (10.0, 0.0), (7.0, 0.0)])
def test_a_tower_that_seems_faster_with_attention_makes_no_time_negative(
    make_model, monkeypatch, with_attention, extra
):
    """On a noisy machine the forward that does more may be measured as the shorter one."""

    def read(run, seconds):
        run()
        if run.func.__name__ == "encode":
            return with_attention if run.args[0] else 10.0
        return 1.0

    monkeypatch.setattr(latency, "milliseconds", read)
    images = latency.make_noise(make_model(), None, 2, 0)
    spent = [
        entry["milliseconds"]
        for reducer in (Random(), Attentive())
        for entry in latency.time_selection(images, reducer, [0.5], 0.1)
    ]
    assert spent == [0.5, pytest.approx((1 + extra) / 2)]


def test_a_selector_is_asked_anew_each_time(make_model, monkeypatch):
    images = latency.make_noise(make_model(), None, 2, 0)
    seen = images.encode()
    reducer = SelectorReducer(FeatureSelector(24, (4, 4), layers=1, heads=2))
    ranked = []
    monkeypatch.setattr(reducer.selector, "forward", lambda x, grid: ranked.append(x) or x.mean(-1))
    first, again = (images.select(reducer, seen, 0.25) for _ in range(2))
    assert torch.equal(first, again) and len(ranked) == 2


def test_a_merger_is_asked_for_its_tokens(make_model):
    class Merging(Attentive):
        needs: ClassVar[frozenset[str]] = frozenset()

        def merge(self, encoded, budget):
            first_BK = torch.arange(budget).repeat(len(encoded.features_BND), 1)
            return first_BK, encoded.features_BND[:, :budget] + 1

    images = latency.make_noise(make_model(), None, 2, 0)
    seen = images.encode()
    keep_BK, merged_BKD = images.select(Merging(), seen, 0.25)
    assert keep_BK.tolist() == [[0, 1, 2, 3]] * 2
    assert torch.equal(merged_BKD, seen.features_BND[:, :4] + 1)


@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_onevision"])
def test_prefill_is_one_forward_of_so_many_tokens(make_model, monkeypatch):
    model, shapes = make_model(), []

    def read(run, seconds):
        output = run()
        shapes.append((output.logits.shape[:2], output.past_key_values.get_seq_length()))
        return 6.0

    monkeypatch.setattr(latency, "milliseconds", read)
    assert latency.time_prefill(model, 5, 2, 0.1) == {"tokens": 5, "batch": 2, "milliseconds": 3.0}
    assert shapes == [((2, 1), 5)]


def test_the_times_of_a_machine_are_times(make_model):
    model = make_model()
    own, same, other = (latency.make_noise(model, None, 2, seed) for seed in (0, 0, 1))
    (entry,) = latency.time_selection(own, Random(), [0.5], 0.01)
    assert 0 < entry["milliseconds"] < 10_000
    assert 0 < latency.time_prefill(model, 5, 2, 0.01)["milliseconds"] < 10_000
    assert torch.equal(own.pixels_BCHW, same.pixels_BCHW)
    assert not torch.equal(own.pixels_BCHW, other.pixels_BCHW)


@pytest.fixture(scope="module", params=["qwen2_5_vl", "internvl"])
def ruled(request, tmp_path_factory):
    """A tiny model of the rule and its processor, loaded as a stage loads them."""
    folder = tmp_path_factory.mktemp("ruled")
    runpy.run_path(str(ROOT / "tests/checkpoints.py"))["write"](folder, request.param)
    return load_vlm(str(folder), torch.float32)


@pytest.fixture
def pictures(ruled, monkeypatch):
    """Three small pictures of noise; InternVL cuts them into tiles."""
    monkeypatch.setattr(latency, "PICTURE", (96, 64))
    return latency.make_noise(*ruled, 3, 0)


def test_a_picture_of_noise_has_the_tokens_of_its_family(ruled, pictures):
    model, kind = ruled[0], ruled[0].config.model_type
    placeholders = int((pictures.inputs["input_ids"] == model.config.image_token_id).sum())
    assert pictures.count == 3 and pictures.tokens * 3 == placeholders
    assert pictures.is_cut == (kind == "internvl")
    if kind == "qwen2_5_vl":
        assert pictures.tokens == int(pictures.inputs["image_grid_thw"][0].prod()) // 4
    again, other = (latency.make_noise(*ruled, 3, seed).inputs["pixel_values"] for seed in (0, 1))
    assert torch.equal(again, pictures.inputs["pixel_values"]) and not torch.equal(again, other)


def test_every_reducer_that_serves_a_family_is_timed_on_it(ruled, pictures, monkeypatch):
    results = []

    def read(run, seconds):
        results.append(run())
        return 3.0 if run.func.__name__ == "select" else 6.0 * (1 + bool(run.args[0]))

    monkeypatch.setattr(latency, "milliseconds", read)
    kind, timed = ruled[0].config.model_type, set()
    for name in catalog.untrained():
        traits = catalog.reducer_traits(name)
        if traits.budget != "asked" or serves(name, kind, pictures.is_cut):
            continue
        (entry,) = latency.time_selection(pictures, build_reducer(name), [0.25], 0.1)
        extra = 2.0 if {"attention_BN", "keys_BND"} & set(traits.needs) else 0.0
        kept = budget(0.25, pictures.tokens)
        assert entry == {"tokens": pictures.tokens, "kept": kept, "batch": 3, "milliseconds": 1.0 + extra}
        chosen = results[-1][0][0] if traits.merges else results[-1][0]
        assert chosen.shape[-1] == kept
        timed.add(name)
    assert {"random", "class_attention", "dart", "cdpruner_text"} <= timed
    assert ("tome" in timed) == (kind == "qwen2_5_vl")


def test_the_prefill_of_a_family_of_the_rule_is_timed_from_visual_tokens(ruled):
    assert latency.time_prefill(ruled[0], 9, 2, 0.001)["milliseconds"] > 0


def test_no_word_stands_for_an_image(ruled):
    model = ruled[0]
    words = latency._draw_words(model, 4, 1000)
    assert not (words == model.config.image_token_id).any() and words.unique().numel() > 20


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", TINY_TYPES)
def test_the_prefill_of_every_type_is_timed_from_visual_tokens(kind):
    assert latency.time_prefill(tiny_model(tiny_config(kind)), 9, 2, 0.001)["milliseconds"] > 0
