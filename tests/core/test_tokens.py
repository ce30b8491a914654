"""Token arithmetic: exact counts, exact gradients, independence of the batch."""

import cmath
import math
from decimal import Decimal
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from atr.core.tokens import (
    budget,
    gather,
    gumbel_mask_BN,
    mask_of,
    perturb_BN,
    random_mask_BN,
    replace_dropped,
    shares,
    sine_positions,
    sine_positions_of_each,
    top_k_BK,
    top_k_mask_BN,
)


def test_mask_is_binary_with_the_probability_of_the_logit():
    logits = torch.tensor([-2.0, -0.5, 0.0, 1.0, 3.0])
    mask = gumbel_mask_BN(logits.expand(20_000, 5), 0.7, torch.Generator().manual_seed(0))
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(mask.mean(0), logits.sigmoid(), atol=0.015, rtol=0)


def test_mask_is_the_two_logit_gumbel_softmax():
    """Against the paper's form: argmax of {keep, drop} logits, each with its own Gumbel noise."""
    torch.manual_seed(0)
    logits = torch.tensor([-1.0, 0.3, 2.0]).expand(20_000, 3)
    two = torch.stack([logits, torch.zeros_like(logits)], -1)
    reference = torch.nn.functional.gumbel_softmax(two, hard=True)[..., 0].mean(0)
    torch.testing.assert_close(gumbel_mask_BN(logits, 1.0).mean(0), reference, atol=0.015, rtol=0)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_mask_passes_the_gradient_of_the_relaxed_sample(temperature):
    logits = torch.linspace(-3, 3, 12).reshape(2, 6).requires_grad_()
    weights = torch.arange(12.0).reshape(2, 6)
    mask = gumbel_mask_BN(logits, temperature, torch.Generator().manual_seed(1))
    (mask * weights).sum().backward()
    uniform = torch.rand(2, 6, generator=torch.Generator().manual_seed(1))
    soft = torch.sigmoid((logits.detach() + torch.logit(uniform)) / temperature)
    torch.testing.assert_close(logits.grad, weights * soft * (1 - soft) / temperature)
    assert torch.equal(mask.detach(), (soft > 0.5).float())


def test_mask_is_finite_under_extreme_noise(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda shape, **_: torch.tensor([[0.0, 1.0 - 2**-24]]))
    logits = torch.zeros(1, 2, requires_grad=True)
    mask = gumbel_mask_BN(logits, 1.0)
    mask.sum().backward()
    assert mask.tolist() == [[0.0, 1.0]] and logits.grad.isfinite().all()


def test_a_sampled_set_has_k_tokens_for_any_scores():
    for scores in (torch.zeros(41, 40), torch.randn(41, 40), torch.full((41, 40), -1e4)):
        noisy = perturb_BN(scores, 1.0, torch.Generator().manual_seed(0))
        mask = top_k_mask_BN(noisy, torch.arange(41).clamp(min=1))
        assert set(mask.unique().tolist()) <= {0.0, 1.0}
        assert mask.sum(1).tolist() == [1, *range(1, 41)]


def test_a_sampled_set_is_drawn_without_replacement_by_score():
    """Frequencies of all pairs of four tokens, against sequential sampling without replacement."""
    weights = torch.tensor([1.0, 2.0, 3.0, 6.0])
    mask = top_k_mask_BN(perturb_BN(weights.log().expand(40_000, 4), 1.0), torch.full((40_000,), 2))
    for first in range(4):
        for second in range(first + 1, 4):
            one, other = weights[first].item(), weights[second].item()
            expected = one / 12 * other / (12 - one) + other / 12 * one / (12 - other)
            found = (mask[:, first] * mask[:, second]).mean().item()
            assert found == pytest.approx(expected, abs=0.012)


def test_without_noise_a_sampled_set_is_the_top_k():
    scores = torch.randn(6, 20)
    mask = top_k_mask_BN(perturb_BN(scores, 0.0), torch.full((6,), 7))
    assert torch.equal(mask, mask_of(top_k_BK(scores, 7), 20))


def test_the_gradient_of_a_sampled_set_is_that_of_the_distance_to_the_lowest_score():
    scores = torch.randn(2, 6).requires_grad_()
    weights = torch.arange(12.0).reshape(2, 6)
    (top_k_mask_BN(scores, torch.tensor([2, 5])) * weights).sum().backward()
    lowest = scores.detach().sort(1, descending=True).values.gather(1, torch.tensor([[1], [4]]))
    soft = torch.sigmoid(scores.detach() - lowest)
    slope = weights * soft * (1 - soft)
    # The lowest kept score shifts all distances but its own.
    expected = torch.where(scores == lowest, slope - slope.sum(1, keepdim=True), slope)
    torch.testing.assert_close(scores.grad, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scores", [torch.zeros(3, 40), torch.randn(3, 40), torch.randn(3, 40).round()])
def test_top_k_is_exact_for_every_k(scores, dtype):
    scores = scores.to(dtype)
    for k in range(41):
        keep = top_k_BK(scores, k)
        assert keep.shape == (3, k)
        assert (keep.diff(dim=1) > 0).all()  # distinct, in raster order
        for row, kept in zip(scores.tolist(), keep.tolist(), strict=True):
            best = sorted(range(40), key=lambda i: (-row[i], i))[:k]
            assert kept == sorted(best)


def test_top_k_does_not_depend_on_the_batch():
    scores = torch.randn(5, 30).round()
    alone = torch.cat([top_k_BK(row[None], 7) for row in scores])
    assert torch.equal(top_k_BK(scores, 7), alone)


@pytest.mark.parametrize("k", [-1, 5])
def test_top_k_refuses_an_impossible_count(k):
    with pytest.raises(ValueError, match=f"k: {k} is out of range, allowed: 0 <= k <= 4"):
        top_k_BK(torch.zeros(1, 4), k)


def test_random_masks_are_uniform_over_counts_and_tokens():
    images, tokens = 40_000, 5
    mask = random_mask_BN(images, tokens, torch.Generator().manual_seed(0))
    assert mask.shape == (images, tokens) and set(mask.unique().tolist()) == {0.0, 1.0}
    counts = torch.bincount(mask.sum(1).long(), minlength=tokens + 1) / images
    torch.testing.assert_close(counts, torch.tensor([0.0, *[1 / tokens] * tokens]), atol=0.01, rtol=0)
    # All sets of a count are equally likely: ten pairs for two tokens.
    pairs = mask[mask.sum(1) == 2] @ (2.0 ** torch.arange(tokens))
    _, often = pairs.unique(return_counts=True)
    torch.testing.assert_close(often / len(pairs), torch.full((10,), 0.1), atol=0.015, rtol=0)


def test_random_masks_depend_on_the_generator_alone():
    first, again = (random_mask_BN(8, 9, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, random_mask_BN(8, 9, torch.Generator().manual_seed(2)))


def test_replace_gather_and_mask_agree():
    features = torch.randn(2, 5, 3)
    keep = torch.tensor([[0, 3], [1, 4]])
    mask = mask_of(keep, 5)
    assert mask.tolist() == [[1, 0, 0, 1, 0], [0, 1, 0, 0, 1]]
    vector = torch.tensor([7.0, 8.0, 9.0])
    replaced = replace_dropped(features, mask, vector)
    assert torch.equal(replaced[mask.bool()], gather(features, keep).flatten(0, 1))
    assert torch.equal(gather(features, keep)[1], features[1, [1, 4]])
    assert (replaced[~mask.bool()] == vector).all()


def test_replacing_tokens_passes_gradients_to_the_mask():
    features, vector = torch.randn(1, 2, 3), torch.randn(3)
    mask = torch.tensor([[1.0, 0.0]], requires_grad=True)
    replace_dropped(features, mask, vector).sum().backward()
    torch.testing.assert_close(mask.grad, (features - vector).sum(-1))


@pytest.mark.parametrize(
    ("keep", "tokens", "expected"),
    [
        (0.3, 144, 43),
        (0.5, 145, 73),
        (0.145, 100, 15),  # 14.499999 in binary
        (0.001, 144, 1),
        (0.0, 144, 0),
        (1.0, 144, 144),
        (1, 144, 1),
        (0, 144, 0),
        (144, 144, 144),
    ],
)
def test_budget(keep, tokens, expected):
    assert budget(keep, tokens) == expected


@given(st.floats(0, 1), st.integers(1, 3000))
def test_budget_is_within_half_a_token(keep, tokens):
    count = budget(keep, tokens)
    assert 0 <= count <= tokens
    assert abs(count - keep * tokens) <= 0.5 + 1e-9 or count == 1


COUNTS = (int, *(np.dtype(name).type for name in ("int8", "uint8", "int32", "int64")), np.array)
COUNTS += tuple(partial(torch.tensor, dtype=kind) for kind in (torch.uint8, torch.int32, torch.int64))
FRACTIONS = (float, np.float16, np.float32, np.float64, np.longdouble, np.array)
FRACTIONS += tuple(
    partial(torch.tensor, dtype=kind) for kind in (torch.float16, torch.float32, torch.float64)
)


@given(st.integers(0, 127), st.integers(0, 3000), st.sampled_from(COUNTS))
def test_an_integer_of_numpy_or_torch_is_a_count(count, more, kind):
    assert budget(kind(count), count + more) == count
    assert type(budget(kind(count), count + more)) is int


@given(st.integers(0, 1000), st.integers(0, 3000), st.sampled_from(FRACTIONS))
def test_a_float_of_numpy_or_torch_is_the_fraction_it_prints_as(permille, tokens, kind):
    """Thousandths are exact as printed decimals, not as values: float16's 0.7 is 0.7002."""
    assert budget(kind(permille / 1000), tokens) == budget(permille / 1000, tokens)


@pytest.mark.parametrize("kind", FRACTIONS)
def test_a_low_precision_float_rounds_as_its_printed_decimal(kind):
    """float32's 0.7 and float16's 0.1 are below 0.7 and 0.1."""
    assert (budget(kind(0.7), 5), budget(kind(0.1), 5), budget(kind(0.3), 5)) == (4, 1, 2)


def test_bfloat16_is_its_exact_value():
    assert budget(torch.tensor(0.75, dtype=torch.bfloat16), 10) == 8
    assert budget(torch.tensor(1.0, dtype=torch.bfloat16), 10) == 10


@given(st.floats(0, 1))
def test_a_fraction_of_no_tokens_is_zero(keep):
    assert budget(keep, 0) == 0


WRONG = [-0.1, 1.1, math.nan, math.inf, -math.inf, -1, 11, True, "0.5", None, 1j, Decimal("0.5"), [1], b"1"]
WRONG += [
    np.int64(11),
    np.float32("nan"),
    np.float64("inf"),
    np.float32(1.5),
    np.bool_(True),
    np.array([0.5]),
]
WRONG += [
    torch.tensor(11),
    torch.tensor(-0.5),
    torch.tensor(math.nan),
    torch.tensor(True),
    torch.tensor([0.5]),
]


@pytest.mark.parametrize("keep", WRONG)
def test_budget_refuses(keep):
    with pytest.raises(ValueError, match=r"keep: .* is out of range, allowed: "):
        budget(keep, 10)


@given(st.lists(st.integers(0, 729), min_size=1, max_size=37), st.data())
def test_shares_are_integers_in_proportion_that_sum_to_the_total(sizes, data):
    total = data.draw(st.integers(0, sum(sizes)))
    parts = shares(total, sizes)
    assert sum(parts) == total
    for part, size in zip(parts, sizes, strict=True):
        assert 0 <= part <= size
        assert abs(part - (total * size / sum(sizes) if total else 0)) < 1


def test_shares_go_to_the_largest_remainders_and_ties_to_the_first():
    assert shares(10, [6, 6, 2]) == [4, 4, 2]  # 4.29, 4.29 and 1.43
    assert shares(5, [4, 4, 4, 4]) == [2, 1, 1, 1]
    assert shares(1152, [576] * 5) == [231, 231, 230, 230, 230]
    assert shares(0, [0, 3]) == [0, 0]


@pytest.mark.parametrize("total", [-1, 6])
def test_shares_of_more_than_all_tokens_are_refused(total):
    with pytest.raises(ValueError, match=rf"total: {total} is out of range, allowed: 0 <= total <= 5"):
        shares(total, [2, 3])


def test_sine_positions_differ_for_all_cells_and_separate_rows_from_columns():
    positions = sine_positions((3, 5), 16)
    assert positions.shape == (15, 16)
    assert torch.cdist(positions, positions).fill_diagonal_(1).min() > 0.1
    table = positions.reshape(3, 5, 16)
    assert torch.equal(table[1, 0, :8], table[1, 4, :8])  # rows in the first half
    assert torch.equal(table[0, 2, 8:], table[2, 2, 8:])  # columns in the second
    torch.testing.assert_close(table[2, 0, :1], torch.tensor([2.0]).sin())
    assert torch.equal(sine_positions((2, 5), 16), positions[:10])


@pytest.mark.parametrize("grid, width", [((3, 5), 16), ((7, 2), 8), ((2, 3), 64)])
def test_the_wavelengths_of_sine_positions_rise_geometrically_to_20000_pi(grid, width):
    """Against complex exponentials, cell by cell."""
    bands = width // 4
    turns = [complex(0, 10_000 ** (-band / bands)) for band in range(bands)]
    for place, row in enumerate(sine_positions(grid, width).tolist()):
        waves = [cmath.exp(turn * cell) for cell in divmod(place, grid[1]) for turn in turns]
        parts = [
            [wave.imag for wave in half] + [wave.real for wave in half]
            for half in (waves[:bands], waves[bands:])
        ]
        assert row == pytest.approx([*parts[0], *parts[1]], abs=1e-5)


def test_sine_positions_refuse_a_width_not_divisible_by_4():
    with pytest.raises(ValueError, match=r"width: 18 .* a multiple of 4"):
        sine_positions((2, 2), 18)


def test_sine_positions_of_several_grids_are_those_of_each():
    grids = [(2, 5), (1, 1), (7, 3), (2, 5)]
    each = torch.cat([sine_positions(grid, 16) for grid in grids])
    assert torch.equal(sine_positions_of_each(grids, 16), each)
    with pytest.raises(ValueError, match="width: 18 cannot carry 2-D sine positions"):
        sine_positions_of_each(grids, 18)
