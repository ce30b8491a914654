"""All tokens and none."""

import pytest
import torch

from atr.reduction import EncoderOutput, Full, NoImage


def test_full_keeps_all_tokens_and_none_no_token():
    batch = EncoderOutput(torch.randn(4, 20, 8), (4, 5))
    assert Full()(batch, 20).tolist() == [list(range(20))] * 4
    assert NoImage()(batch, 0).shape == (4, 0)
    with pytest.raises(ValueError, match="reducer full: budget 19"):
        Full()(batch, 19)
    with pytest.raises(ValueError, match="reducer none: budget 1"):
        NoImage()(batch, 1)
