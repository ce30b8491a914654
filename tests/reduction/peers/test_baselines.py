"""The baselines against their definitions, image by image."""

import itertools
import math
import statistics
from dataclasses import replace

import pytest
import torch

from atr.reduction import EncoderOutput, Full, NoImage, Scorer
from atr.reduction.peers.l2_norm import L2Norm
from atr.reduction.peers.pixel_variance import PixelVariance
from atr.reduction.peers.random import Random
from atr.reduction.peers.uniform import Uniform
from atr.reduction.rectangles import rectangles

GRIDS = [*itertools.product(range(1, 7), range(1, 7)), (3, 17), (17, 3)]


def encoded(images=4, dtype=torch.float32, seed=0):
    features = torch.randn(images, 20, 8, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return EncoderOutput(features, (4, 5))


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
    alone = torch.cat([Random(1)(EncoderOutput(row[None], (4, 5)), 7) for row in batch.features_BND.flip(0)])
    assert torch.equal(together, alone.flip(0))
    assert not torch.equal(together, Random(2)(batch, 7))
    assert len(set(map(tuple, together.tolist()))) == 4


def test_random_is_seeded_by_the_image_key_or_else_by_the_features():
    batch = encoded()
    own = replace(encoded(seed=1), image_key_BX=batch.features_BND)
    assert torch.equal(Random(1)(own, 7), Random(1)(batch, 7))
    assert not torch.equal(Random(1)(own, 7), Random(1)(encoded(seed=1), 7))
    # The draws for stored features must never change: committed results depend on them.
    assert Random(1)(batch, 4).tolist() == [[2, 9, 12, 15], [6, 7, 10, 13], [0, 8, 11, 12], [1, 7, 8, 19]]


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


def test_baselines_without_needs_take_tokens_without_a_grid():
    features = encoded().features_BND
    for reducer, budget in ((Full(), 20), (NoImage(), 0), (Random(2), 7)):
        assert not reducer.needs
        assert torch.equal(reducer(EncoderOutput(features, None), budget), reducer(encoded(), budget))


@pytest.mark.parametrize("grid", GRIDS)
def test_uniform_keeps_the_token_nearest_the_middle_of_each_rectangle(grid):
    batch = EncoderOutput(torch.zeros(2, grid[0] * grid[1], 1), grid)
    for count in range(1, batch.tokens + 1):
        keep = Uniform()(batch, count)
        assert keep.shape == (2, count) and torch.equal(keep[0], keep[1])
        assert (keep.diff(dim=1) > 0).all()
        for token, (top, bottom, left, right) in zip(
            keep[0].tolist(), rectangles(grid, count).tolist(), strict=True
        ):
            row, column = divmod(token, grid[1])
            centre = (top + bottom - 1) / 2, (left + right - 1) / 2
            assert abs(row - centre[0]) <= 0.5 and abs(column - centre[1]) <= 0.5
            assert row >= centre[0] and column >= centre[1]


@pytest.mark.parametrize(
    ("grid", "count", "stride"),
    [((12, 12), 36, (2, 2)), ((9, 15), 15, (3, 3)), ((15, 9), 15, (3, 3)), ((6, 24), 6, (6, 4))],
)
def test_uniform_has_an_even_stride_in_both_directions(grid, count, stride):
    [keep] = Uniform()(EncoderOutput(torch.zeros(1, grid[0] * grid[1], 1), grid), count)
    rows, columns = (range(step // 2, side, step) for side, step in zip(grid, stride, strict=True))
    assert keep.tolist() == [row * grid[1] + column for row in rows for column in columns]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_l2_norm_keeps_the_longest_tokens_the_first_of_equal_ones(dtype):
    batch = encoded(dtype=dtype)
    batch.features_BND[:, 7] = batch.features_BND[:, 12] = -batch.features_BND[:, 3]
    norms = [[math.hypot(*token) for token in image] for image in batch.features_BND.tolist()]
    torch.testing.assert_close(L2Norm().scores(batch), torch.tensor(norms))
    for k in range(21):
        longest = [sorted(sorted(range(20), key=lambda token: (-row[token], token))[:k]) for row in norms]
        assert L2Norm()(batch, k).tolist() == longest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pixel_variance_is_that_of_the_patch_without_the_margin(dtype):
    torch.manual_seed(0)
    pixels = torch.randn(3, 2, 13, 11).to(dtype)  # 4 x 5 patches of 3 x 2 pixels, and one row and column more
    pixels[:, :, 3:6, :2] = 0.3
    batch = EncoderOutput(torch.zeros(3, 20, 4, dtype=dtype), (4, 5), pixels_BCHW=pixels)
    literal = [
        [
            statistics.fmean(
                statistics.pvariance(channel[row + i][column + j] for i in range(3) for j in range(2))
                for channel in image
            )
            for row in range(0, 12, 3)
            for column in range(0, 10, 2)
        ]
        for image in pixels.tolist()
    ]
    scores = PixelVariance().scores(batch)
    torch.testing.assert_close(scores, torch.tensor(literal))
    assert (scores[:, 5] == 0).all()
    for k in range(21):
        highest = [sorted(sorted(range(20), key=lambda token: -row[token])[:k]) for row in literal]
        assert PixelVariance()(batch, k).tolist() == highest


def test_pixel_variance_needs_a_pixel_for_each_token():
    with pytest.raises(ValueError, match="pixels_BCHW: 3 x 9 pixels, allowed: at least 4 x 5 tokens"):
        PixelVariance().scores(
            EncoderOutput(torch.zeros(1, 20, 4), (4, 5), pixels_BCHW=torch.zeros(1, 3, 3, 9))
        )


def test_which_reducers_score():
    for reducer in (L2Norm(), PixelVariance()):
        assert isinstance(reducer, Scorer) and reducer.threshold is None
    assert not isinstance(Uniform(), Scorer)
