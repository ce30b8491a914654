"""Eq. 7 against numbers worked out by hand."""

import math

import pytest
import torch

from atr.reduction import losses

FEATURES = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[0.0, 0.0], [0.0, 0.0]]])
RESTORED = torch.tensor([[[1.0, 0.0], [3.0, 5.0]], [[1.0, 1.0], [1.0, 1.0]]])


def test_unexplained_variance():
    # Squared errors 4 + 1 and 4 * 1 over 8 numbers, over a variance of 2.
    assert losses.unexplained_variance(RESTORED, FEATURES, torch.tensor(2.0)).item() == pytest.approx(9 / 16)


def test_l2_norm():
    expected = (math.sqrt(5) + 2) / 2
    assert losses.l2_norm(RESTORED, FEATURES, torch.tensor(2.0)).item() == pytest.approx(expected)


def test_guessing_the_mean_leaves_all_variance_unexplained():
    features = torch.randn(64, 9, 4) * torch.tensor([1.0, 2.0, 3.0, 10.0])
    guess = features.mean((0, 1)).expand_as(features)
    variance = features.var((0, 1), correction=0).mean()
    assert losses.unexplained_variance(guess, features, variance).item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("kept", "expected", "slopes"),
    [(8, 1.0, (1, 1)), (6, 0.75, (1, 1)), (4, (1 + 0.3) / 2, (1, 0)), (1, 0.3, (0, 0)), (0, 0.3, (0, 0))],
)
def test_at_least_is_flat_below_p_in_each_image(kept, expected, slopes):
    """Two images of four tokens, of which the first `kept` of all are kept."""
    mask = (torch.arange(8) < kept).float().reshape(2, 4).requires_grad_()
    proportion = losses.at_least(losses.kept_fraction(mask), 0.3)
    proportion.backward()
    assert proportion.item() == pytest.approx(expected)
    assert torch.equal(mask.grad, torch.tensor(slopes)[:, None].expand(2, 4) / 8)
