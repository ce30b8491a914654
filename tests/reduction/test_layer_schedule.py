"""Schedules of token removal between layers, by the papers' numbers and closed forms."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atr.reduction.layer_schedule import Schedule, keep_for, lowest
from atr.reduction.peers.fastv import FastV
from atr.reduction.peers.pyramiddrop import PyramidDrop


@settings(deadline=None)
@given(st.integers(4, 48), st.floats(0, 1), st.integers(1, 3000))
def test_the_mean_is_over_the_counts_of_the_layers(depth, keep, size):
    for schedule in (FastV(3).schedule(depth, keep), PyramidDrop().schedule(depth, keep)):
        counts = [schedule.count(layer, size) for layer in range(depth)]
        assert counts == sorted(counts, reverse=True)
        assert schedule.mean(size) == pytest.approx(sum(counts) / depth)
    assert counts[: depth // 4] == [size] * (depth // 4)


def test_schedules_are_those_of_the_papers():
    """FastV keeps half after layer 2; PyramidDrop 50, 25 and 12.5 % after 8, 16 and 24 of 32 layers."""
    half, pyramid = FastV().schedule(32, 0.5), PyramidDrop().schedule(32, 0.5)
    assert half == Schedule(32, {2: 0.5}, own=False)
    assert pyramid == Schedule(32, {8: 0.5, 16: 0.25, 24: 0.125}, own=True)
    assert half.mean(576) == (2 * 576 + 30 * 288) / 32
    assert pyramid.mean(576) == (576 + 288 + 144 + 72) / 4


def test_pyramiddrop_has_one_stage_for_each_of_fewer_than_four_layers():
    assert PyramidDrop().schedule(3, 0.5) == Schedule(3, {1: 0.5, 2: 0.25}, own=True)
    assert PyramidDrop().schedule(2, 0.5) == Schedule(2, {1: 0.5}, own=True)


@settings(deadline=None)
@given(st.integers(1, 8), st.integers(1, 40), st.floats(0, 1))
def test_keep_for_of_fastv_is_its_closed_form(layer, more, mean):
    layers, size = layer + more, 10**9
    keep = keep_for(FastV(layer), mean, layers, size)
    if keep is None:
        assert mean < (layer + more / size) / layers + 1e-12
    else:
        assert keep == pytest.approx((mean * layers - layer) / more, abs=1e-7)


@settings(deadline=None)
@given(st.integers(2, 48), st.integers(2, 3000), st.floats(0, 1))
def test_keep_for_gives_the_mean_or_none_below_the_lowest(layers, size, mean):
    for reducer in (FastV(1), PyramidDrop()):
        keep = keep_for(reducer, mean, layers, size)
        whole = min(reducer.schedule(layers, 0.5).drops)  # layers that read every token; the others read one
        assert lowest(reducer, layers, size) == pytest.approx((whole + (layers - whole) / size) / layers)
        assert (keep is None) == (mean < lowest(reducer, layers, size))
        # Counts are whole: one is half a token off, and a single token up to a whole one.
        if keep is not None:
            assert abs(reducer.schedule(layers, keep).mean(size) - mean * size) < 1
            assert 0 < keep <= 1


def test_the_lowest_mean_leaves_one_token():
    """Of 16 tokens in three layers: FastV reads 16, 16 and 1 at least, PyramidDrop 16, 1 and 1."""
    for reducer, least in ((FastV(), 33 / 48), (PyramidDrop(), 18 / 48)):
        assert keep_for(reducer, least - 1e-6, 3, 16) is None
        reached = reducer.schedule(3, keep_for(reducer, least + 1e-6, 3, 16)).mean(16)
        assert 16 * least <= reached < 16 * least + 0.5
        assert keep_for(reducer, 1.0, 3, 16) == 1.0


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Schedule(5, {}, own=True), "drops: there is none"),
        (lambda: Schedule(5, {0: 0.5}, own=True), "layer: 0 is out of range, allowed: 1 <= layer < 5"),
        (lambda: Schedule(5, {5: 0.5}, own=False), "layer: 5 is out of range"),
        (lambda: Schedule(5, {1: 1.5}, own=False), r"keep: 1\.5 is out of range, allowed: 0 <= keep <= 1"),
        (lambda: Schedule(5, {1: np.int64(1)}, own=False), r"keep: 1 is .*, a fraction and no count"),
        (lambda: Schedule(5, {1: float("nan")}, own=False), r"keep: nan is out of range"),
        (lambda: Schedule(5, {3: 0.5, 1: 0.2}, own=False), r"keep: 0\.5 is .* allowed: 0 <= keep <= 0\.2"),
        (lambda: Schedule(5, {1: math.nan}, own=False), "keep: nan is out of range"),
    ],
)
def test_an_impossible_schedule_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
