"""Inputs and selections of reducers are checked in one place."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from atr.reduction import EncoderOutput, Full, NoImage
from atr.reduction.checked import select, select_merged, select_scores
from atr.reduction.peers.average_pooling import AveragePooling
from atr.reduction.peers.l2_norm import L2Norm
from atr.reduction.peers.pixel_variance import PixelVariance
from atr.reduction.peers.random import Random
from atr.reduction.peers.tome import ToMe
from atr.reduction.peers.uniform import Uniform
from atr.reduction.registry import build_reducer, built_in_names, placeholder


class Given:
    """Returns the given selection, and needs attention and grid."""

    needs = frozenset({"attention_BN", "grid"})

    def __init__(self, keep, merged=None):
        self.keep, self.merged = torch.as_tensor(keep), merged

    def __call__(self, encoded, budget):
        return self.keep

    def merge(self, encoded, budget):
        return self.keep, self.merged


@pytest.fixture
def batch():
    torch.manual_seed(0)
    return EncoderOutput(torch.randn(3, 6, 4), (2, 3), torch.rand(3, 6), keys_BND=torch.randn(3, 6, 2))


def test_select_returns_the_reducers_selection(batch):
    for reducer in (Random(3), Uniform(), L2Norm(), AveragePooling(), ToMe()):
        for k in range(1, 7):
            assert torch.equal(select(reducer, batch, k), reducer(batch, k))
    keep, merged = select_merged(ToMe(), batch, 4)
    assert torch.equal(keep, ToMe()(batch, 4)) and torch.equal(merged, ToMe().merge(batch, 4)[1])
    assert select(Full(), batch, 6).tolist() == [[0, 1, 2, 3, 4, 5]] * 3
    assert select(NoImage(), batch, 0).shape == (3, 0)


def test_a_grid_of_one_token():
    one = EncoderOutput(torch.randn(2, 1, 4), (1, 1), keys_BND=torch.randn(2, 1, 4))
    for reducer in (Random(), Uniform(), L2Norm(), AveragePooling(), ToMe()):
        assert select(reducer, one, 1).tolist() == [[0], [0]]


def test_a_missing_field_is_named_with_the_reducers_that_do_not_need_it(batch):
    for absent, there in (("attention_BN", {"grid", "keys_BND"}), ("attention_BN, grid", {"keys_BND"})):
        before = [name for name in built_in_names() if name not in ("fastv", "pyramiddrop")]
        names = [name for name in before if build_reducer(name, 0, placeholder()).needs <= there]
        assert "random" in names and ("selector" in names) == ("grid" in there)
        message = f"reducer Given needs {absent}, which was not encoded, allowed: {', '.join(names)}"
        without = replace(batch, **dict.fromkeys(absent.split(", ")))
        with pytest.raises(ValueError, match=f"^{message}$"):
            select(Given([[0]] * 3), without, 1)
    with pytest.raises(ValueError, match="reducer ToMe needs keys_BND, which was not encoded"):
        select_merged(ToMe(), replace(batch, keys_BND=None), 2)


@pytest.mark.parametrize("budget", [-1, 0, 7])
def test_budgets_out_of_range_are_refused_before_the_reducer_is_called(batch, budget):
    message = rf"reducer Given: budget {budget} is out of range, allowed: 1 to 6 tokens"
    for asked in (select, select_merged):
        with pytest.raises(ValueError, match=message):
            asked(Given([[0]]), batch, budget)
    with pytest.raises(ValueError, match="reducer none: budget 2 is not allowed"):
        select(NoImage(), batch, 2)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("field", ["features_BND", "attention_BN"])
def test_values_that_are_not_finite_are_refused_if_they_are_read(batch, field, wrong):
    values = getattr(batch, field).clone()
    values[1, 4], values[2, 0] = wrong, wrong
    broken = replace(batch, **{field: values})
    with pytest.raises(ValueError, match=rf"reducer Given: {field} of images \[1, 2\] of 3 holds NaN"):
        select(Given([[0]] * 3), broken, 1)
    if field != "features_BND":
        assert torch.equal(select(Random(), broken, 2), Random()(batch, 2))


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ([[0, 1]] * 2, r"kept indices have shape \(2, 2\), allowed: \(3, 2\)"),
        ([[0, 1, 2]] * 3, r"kept indices have shape \(3, 3\), allowed: \(3, 2\)"),
        ([[0, 1], [2, 2], [0, 1]], "a token is kept twice, allowed: distinct tokens"),
        ([[0, 1], [3, 2], [0, 1]], "kept indices are out of order, allowed: raster order"),
        ([[0, 1], [0, 6], [0, 1]], "kept index 6 is out of range, allowed: 0 to 5"),
        ([[-1, 1], [0, 5], [0, 1]], "kept index -1 is out of range, allowed: 0 to 5"),
        ([[0.0, 1.0]] * 3, "kept indices are torch.float32, allowed: torch.int64"),
    ],
)
def test_a_wrong_selection_is_refused(batch, keep, message):
    for asked in (select, select_merged):
        with pytest.raises(ValueError, match=f"^reducer Given: {message}$"):
            asked(Given(keep, torch.zeros(3, 2, 4)), batch, 2)


@pytest.mark.parametrize(
    ("merged", "message"),
    [
        (torch.zeros(3, 3, 4), r"merged features have shape \(3, 3, 4\), allowed: \(3, 2, 4\)"),
        (torch.zeros(3, 2, 4).double(), "merged features are torch.float64, allowed: torch.float32"),
    ],
)
def test_wrong_merged_features_are_refused(batch, merged, message):
    with pytest.raises(ValueError, match=f"^reducer Given: {message}$"):
        select_merged(Given([[0, 1]] * 3, merged), batch, 2)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_merged_features_that_are_not_finite_are_refused_by_image(batch, wrong):
    merged = torch.zeros(3, 2, 4)
    merged[1, 1, 3] = wrong
    with pytest.raises(ValueError, match=r"^reducer Given: merged features of images \[1\] of 3 holds NaN"):
        select_merged(Given([[0, 1]] * 3, merged), batch, 2)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_refused_by_image(batch, wrong):
    scores = torch.zeros(3, 6)
    scores[2, 5] = wrong
    scorer = SimpleNamespace(needs=frozenset(), scores=lambda encoded: scores)
    with pytest.raises(ValueError, match=r"^reducer SimpleNamespace: scores of images \[2\] of 3 holds NaN"):
        select_scores(scorer, batch)


@pytest.mark.parametrize("reducer", [L2Norm(), PixelVariance()])
def test_finite_values_whose_squares_overflow_are_refused(batch, reducer):
    huge = EncoderOutput(batch.features_BND * 1e30, (2, 3), pixels_BCHW=torch.randn(3, 1, 4, 6) * 1e30)
    with pytest.raises(ValueError, match=rf"^reducer {type(reducer).__name__}: scores of images"):
        select(reducer, huge, 2)
