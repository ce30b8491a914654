"""The data that reducers read."""

from dataclasses import replace

import pytest
import torch

from atr.reduction import EncoderOutput


def batch():
    return EncoderOutput(torch.randn(3, 20, 8), (4, 5), attention_BN=torch.rand(3, 20))


def test_a_grid_must_hold_the_tokens():
    with pytest.raises(ValueError, match="grid 3 x 5 does not hold 20 tokens"):
        replace(batch(), grid=(3, 5))
    assert replace(batch(), grid=None).tokens == 20


def test_some_images_come_in_the_given_order_with_all_their_fields():
    encoded = batch()
    some = encoded.of([2, 0, 2])
    assert torch.equal(some.features_BND, encoded.features_BND[[2, 0, 2]])
    assert torch.equal(some.attention_BN, encoded.attention_BN[[2, 0, 2]])
    assert some.grid == (4, 5) and some.keys_BND is None


def test_a_required_field_that_was_not_encoded_is_named():
    encoded = batch()
    assert encoded.require("attention_BN") is encoded.attention_BN and encoded.require_grid() == (4, 5)
    with pytest.raises(ValueError, match="keys_BND was not encoded"):
        encoded.require("keys_BND")
    with pytest.raises(ValueError, match="grid was not encoded"):
        replace(encoded, grid=None).require_grid()
