"""What is timed and how times add up, on a clock of our own: the numbers of a machine prove nothing."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from atr.core.tokens import budget
from atr.reduction import FeatureSelector, SelectorReducer
from atr.reduction.peers.random import Random
from atr.vlm import latency


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
        if run.func is latency.encode_noise:
            return 14.0 if run.args[2] else 10.0
        return 1.0

    monkeypatch.setattr(latency, "milliseconds", read)
    return ran


@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_onevision"])
def test_attention_is_paid_for_by_those_who_need_it(make_model, clock):
    model = make_model()
    pixels = latency.noise(model, 3, 0)
    for reducer, spent in ((Random(), 1), (Attentive(), 1 + 4)):
        entries = list(latency.time_selection(model, reducer, [0.25, 0.5], pixels, 0.1))
        assert [tuple(entry.values()) for entry in entries] == [
            (16, kept, 3, pytest.approx(spent / 3)) for kept in (budget(0.25, 16), budget(0.5, 16))
        ]
    kept = [result for run, result in clock if run is latency._select]
    assert [keep_BK.shape for keep_BK in kept] == [(3, 4), (3, 8)] * 2
    assert sum(run is latency.encode_noise for run, _ in clock) == 2  # once with, once without


@pytest.mark.parametrize("with_attention, extra", [(14.0, 4.0), (10.0, 0.0), (7.0, 0.0)])
def test_a_tower_that_seems_faster_with_attention_makes_no_time_negative(
    make_model, monkeypatch, with_attention, extra
):
    """On a noisy machine the forward that does more may be measured as the shorter one."""

    def read(run, seconds):
        run()
        if run.func is latency.encode_noise:
            return with_attention if run.args[2] else 10.0
        return 1.0

    monkeypatch.setattr(latency, "milliseconds", read)
    pixels = latency.noise(make_model(), 2, 0)
    spent = [
        entry["milliseconds"]
        for reducer in (Random(), Attentive())
        for entry in latency.time_selection(make_model(), reducer, [0.5], pixels, 0.1)
    ]
    assert spent == [0.5, pytest.approx((1 + extra) / 2)]


def test_a_selector_is_asked_anew_each_time(make_model, monkeypatch):
    model = make_model()
    seen = latency.encode_noise(model, latency.noise(model, 2, 0), frozenset())
    reducer = SelectorReducer(FeatureSelector(24, (4, 4), layers=1, heads=2))
    ranked = []
    monkeypatch.setattr(reducer.selector, "forward", lambda x, grid: ranked.append(x) or x.mean(-1))
    first, again = (latency._select(reducer, seen, 4) for _ in range(2))
    assert torch.equal(first, again) and len(ranked) == 2


def test_a_merger_is_asked_for_its_tokens(make_model):
    class Merging(Attentive):
        needs: ClassVar[frozenset[str]] = frozenset()

        def merge(self, encoded, budget):
            first_BK = torch.arange(budget).repeat(len(encoded.features_BND), 1)
            return first_BK, encoded.features_BND[:, :budget] + 1

    model = make_model()
    seen = latency.encode_noise(model, latency.noise(model, 2, 0), frozenset())
    keep_BK, merged_BKD = latency._select(Merging(), seen, 4)
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
    pixels = latency.noise(model, 2, 0)
    (entry,) = latency.time_selection(model, Random(), [0.5], pixels, 0.01)
    assert 0 < entry["milliseconds"] < 10_000
    assert 0 < latency.time_prefill(model, 5, 2, 0.01)["milliseconds"] < 10_000
    assert torch.equal(pixels, latency.noise(model, 2, 0)) and not torch.equal(
        pixels, latency.noise(model, 2, 1)
    )
