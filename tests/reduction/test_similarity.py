"""Cosines that are equal for equal tokens and do not depend on the batch."""

import numpy as np
import pytest
import torch

from atr.reduction.similarity import exact_cosines_BNN, rounded_cosines_BNN


@pytest.mark.parametrize(("images", "tokens", "width"), [(3, 7, 5), (4, 50, 1030)])
def test_cosines_are_exact(images, tokens, width):
    features = torch.randn(images, tokens, width, generator=torch.Generator().manual_seed(0))
    features[0, 1], features[0, 2], features[0, 3] = features[0, 0], 3 * features[0, 0], 0
    values = features[0].double().numpy()
    lengths = np.linalg.norm(values, axis=1)
    literal = values @ values.T / np.where(np.outer(lengths, lengths) > 0, np.outer(lengths, lengths), 1)
    similarity = exact_cosines_BNN(features)
    units = torch.nn.functional.normalize(features[0].double(), dim=-1).mul(2**26).round()
    whole = units.long().numpy().astype(object)
    expected = (whole @ whole.T).astype(float) / 2**52
    np.testing.assert_allclose(similarity[0], expected, atol=2**-37, rtol=0)
    np.testing.assert_allclose(similarity[0], literal, atol=1e-7, rtol=0)
    assert torch.equal(similarity * 2**36, (similarity * 2**36).round())
    assert torch.equal(similarity, torch.cat([exact_cosines_BNN(image[None]) for image in features]))
    assert torch.equal(similarity, similarity.mT)
    assert torch.equal(similarity[0, 0], similarity[0, 1]) and not similarity[0, 3].any()


def test_equal_tokens_have_equal_rounded_cosines_in_any_place():
    features = torch.randn(1, 1, 700).repeat(2, 131, 1)
    features[:, ::3] = torch.randn(700)
    similar = rounded_cosines_BNN(features)
    assert len(similar.unique()) == 2 and torch.equal(similar[:1], rounded_cosines_BNN(features[:1]))
