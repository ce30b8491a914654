"""Attention of long images, whose matrix of all pairs is not held in memory."""

import pytest
import torch

from atr.reduction import layers
from atr.reduction.layers import Block


@pytest.mark.parametrize("tokens", [layers._PLAIN_TOKENS, layers._PLAIN_TOKENS + 1])
def test_attention_of_a_long_image_is_fused_and_the_same(tokens, monkeypatch):
    torch.manual_seed(0)
    block, x_BND = Block(32, heads=2, ffn_ratio=1.0), torch.randn(1, tokens, 32)
    with torch.no_grad():
        own = block(x_BND)
        fused = []
        monkeypatch.setattr(
            layers.F,
            "scaled_dot_product_attention",
            lambda *args, real=layers.F.scaled_dot_product_attention: fused.append(1) or real(*args),
        )
        block(x_BND)
        assert len(fused) == (tokens > layers._PLAIN_TOKENS)
        monkeypatch.setattr(layers, "_PLAIN_TOKENS", tokens)
        torch.testing.assert_close(block(x_BND), own, atol=1e-5, rtol=1e-4)
    fused.clear()
    monkeypatch.setattr(layers, "_PLAIN_TOKENS", tokens - 1)
    block(x_BND).sum().backward()
    assert not fused, "training on a CPU takes the plain operations"
