"""The floors keep what their names say, image by image."""

import pytest
import torch

from atr.reduction import REDUCERS, Encoded, Full, NoImage, Random


def encoded(images=4, dtype=torch.float32, seed=0):
    features = torch.randn(images, 20, 8, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return Encoded(features, (4, 5))


def test_registry_has_the_configured_names():
    from atr import config

    assert tuple(REDUCERS) == config.REDUCERS
    assert REDUCERS["random"](3, "unused") == Random(3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_keeps_distinct_tokens_in_raster_order_at_every_budget(dtype):
    batch = encoded(dtype=dtype)
    for k in range(21):
        keep = Random(1)(batch, k)
        assert keep.shape == (4, k) and keep.dtype == torch.int64
        assert (keep.diff(dim=1) > 0).all()
        assert k == 0 or (keep.min() >= 0 and keep.max() < 20)


def test_random_does_not_depend_on_the_batch_but_on_seed_and_image():
    batch = encoded()
    together = Random(1)(batch, 7)
    alone = torch.cat([Random(1)(Encoded(row[None], (4, 5)), 7) for row in batch.features_BND.flip(0)])
    assert torch.equal(together, alone.flip(0))
    assert not torch.equal(together, Random(2)(batch, 7))
    assert len(set(map(tuple, together.tolist()))) == 4


def test_random_is_uniform_over_images_and_over_seeds():
    batch = encoded(images=3000)
    for keep in (
        Random(0)(batch, 5),
        torch.cat([Random(seed)(encoded(images=10), 5) for seed in range(300)]),
    ):
        share = torch.bincount(keep.flatten(), minlength=20) / len(keep)
        torch.testing.assert_close(share, torch.full((20,), 0.25), atol=0.035, rtol=0)


def test_random_budgets_are_nested():
    small, large = (Random(4)(encoded(), k) for k in (5, 9))
    for few, many in zip(small.tolist(), large.tolist(), strict=True):
        assert set(few) < set(many)


def test_full_and_none():
    batch = encoded()
    assert Full()(batch, 20).tolist() == [list(range(20))] * 4
    assert NoImage()(batch, 0).shape == (4, 0)
    with pytest.raises(ValueError, match="reducer full: budget 19"):
        Full()(batch, 19)
    with pytest.raises(ValueError, match="reducer none: budget 1"):
        NoImage()(batch, 1)
    with pytest.raises(ValueError, match="budget: 21"):
        Random()(batch, 21)


def test_encoded_refuses_a_grid_that_does_not_hold_its_tokens():
    with pytest.raises(ValueError, match="grid 3 x 5 does not hold 20 tokens"):
        Encoded(encoded().features_BND, (3, 5))


def test_the_floors_take_tokens_without_a_grid():
    features = encoded().features_BND
    for reducer, budget in ((Full(), 20), (NoImage(), 0), (Random(2), 7)):
        assert not reducer.needs
        assert torch.equal(reducer(Encoded(features, None), budget), reducer(encoded(), budget))
