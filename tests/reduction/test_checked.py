"""What a reducer is asked for and what it answers is checked in one place."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from atr.reduction.peers._baselines import L2Norm, PixelVariance, Uniform
from atr.reduction.peers._merging import AveragePooling, ToMe

from atr.reduction import NEEDS, EncoderOutput, Full, NoImage, Random
from atr.reduction.checked import ask, ask_merged, ask_scores


class Given:
    """Answers what it was made with, and reads attention and grid."""

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


def test_the_answer_is_the_reducers(batch):
    for reducer in (Random(3), Uniform(), L2Norm(), AveragePooling(), ToMe()):
        for k in range(1, 7):
            assert torch.equal(ask(reducer, batch, k), reducer(batch, k))
    keep, merged = ask_merged(ToMe(), batch, 4)
    assert torch.equal(keep, ToMe()(batch, 4)) and torch.equal(merged, ToMe().merge(batch, 4)[1])
    assert ask(Full(), batch, 6).tolist() == [[0, 1, 2, 3, 4, 5]] * 3
    assert ask(NoImage(), batch, 0).shape == (3, 0)


def test_a_grid_of_one_token():
    one = EncoderOutput(torch.randn(2, 1, 4), (1, 1), keys_BND=torch.randn(2, 1, 4))
    for reducer in (Random(), Uniform(), L2Norm(), AveragePooling(), ToMe()):
        assert ask(reducer, one, 1).tolist() == [[0], [0]]


def test_what_was_not_encoded_is_named_beside_the_reducers_that_do_without(batch):
    for absent, there in (("attention_BN", {"grid", "keys_BND"}), ("attention_BN, grid", {"keys_BND"})):
        names = [name for name, needs in NEEDS.items() if needs <= there]
        assert "random" in names and ("selector" in names) == ("grid" in there)
        message = f"reducer Given needs {absent}, which was not encoded, allowed: {', '.join(names)}"
        without = replace(batch, **dict.fromkeys(absent.split(", ")))
        with pytest.raises(ValueError, match=f"^{message}$"):
            ask(Given([[0]] * 3), without, 1)
    with pytest.raises(ValueError, match="reducer ToMe needs keys_BND, which was not encoded"):
        ask_merged(ToMe(), replace(batch, keys_BND=None), 2)


@pytest.mark.parametrize("budget", [-1, 0, 7])
def test_budgets_out_of_range_are_refused_before_the_reducer_is_asked(batch, budget):
    message = rf"reducer Given: budget {budget} is out of range, allowed: 1 to 6 tokens"
    for asked in (ask, ask_merged):
        with pytest.raises(ValueError, match=message):
            asked(Given([[0]]), batch, budget)
    with pytest.raises(ValueError, match="reducer none: budget 2 is not allowed"):
        ask(NoImage(), batch, 2)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("field", ["features_BND", "attention_BN"])
def test_what_is_not_finite_is_refused_where_it_is_read(batch, field, wrong):
    values = getattr(batch, field).clone()
    values[1, 4], values[2, 0] = wrong, wrong
    broken = replace(batch, **{field: values})
    with pytest.raises(ValueError, match=rf"reducer Given: {field} of images \[1, 2\] of 3 holds NaN"):
        ask(Given([[0]] * 3), broken, 1)
    if field != "features_BND":
        assert torch.equal(ask(Random(), broken, 2), Random()(batch, 2))


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ([[0, 1]] * 2, r"kept \(2, 2\), asked for \(3, 2\)"),
        ([[0, 1, 2]] * 3, r"kept \(3, 3\), asked for \(3, 2\)"),
        ([[0, 1], [2, 2], [0, 1]], "kept a token twice, or out of raster order"),
        ([[0, 1], [3, 2], [0, 1]], "kept a token twice, or out of raster order"),
        ([[0, 1], [0, 6], [0, 1]], "kept a token that is none of 6"),
        ([[-1, 1], [0, 5], [0, 1]], "kept a token that is none of 6"),
        ([[0.0, 1.0]] * 3, "kept torch.float32, asked for int64"),
    ],
)
def test_a_reducer_that_is_wrong_is_caught(batch, keep, message):
    for asked in (ask, ask_merged):
        with pytest.raises(AssertionError, match=message):
            asked(Given(keep, torch.zeros(3, 2, 4)), batch, 2)


@pytest.mark.parametrize(
    ("merged", "message"),
    [
        (torch.zeros(3, 3, 4), r"merged to \(3, 3, 4\), asked for \(3, 2, 4\)"),
        (torch.zeros(3, 2, 4).double(), "made torch.float64 of torch.float32"),
    ],
)
def test_a_merger_that_is_wrong_is_caught(batch, merged, message):
    with pytest.raises(AssertionError, match=message):
        ask_merged(Given([[0, 1]] * 3, merged), batch, 2)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_merged_features_that_are_not_finite_are_refused_by_image(batch, wrong):
    merged = torch.zeros(3, 2, 4)
    merged[1, 1, 3] = wrong
    with pytest.raises(ValueError, match=r"^reducer Given: merged features of images \[1\] of 3 holds NaN"):
        ask_merged(Given([[0, 1]] * 3, merged), batch, 2)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_refused_by_image(batch, wrong):
    scores = torch.zeros(3, 6)
    scores[2, 5] = wrong
    scorer = SimpleNamespace(needs=frozenset(), scores=lambda encoded: scores)
    with pytest.raises(ValueError, match=r"^reducer SimpleNamespace: scores of images \[2\] of 3 holds NaN"):
        ask_scores(scorer, batch)


@pytest.mark.parametrize("reducer", [L2Norm(), PixelVariance()])
def test_finite_values_whose_squares_overflow_rank_nothing(batch, reducer):
    huge = EncoderOutput(batch.features_BND * 1e30, (2, 3), pixels_BCHW=torch.randn(3, 1, 4, 6) * 1e30)
    with pytest.raises(ValueError, match=rf"^reducer {type(reducer).__name__}: scores of images"):
        ask(reducer, huge, 2)
