"""Reducers that merge tokens, against transcriptions image by image and token by token."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from atr.reduction import EncoderOutput
from atr.reduction.base import Merger, Scorer
from atr.reduction.merging import group_means
from atr.reduction.peers.average_pooling import AveragePooling
from atr.reduction.peers.image_downsampling import ImageDownsampling, small_grid
from atr.reduction.peers.tome import ToMe
from atr.reduction.peers.uniform import Uniform
from atr.reduction.rectangles import rectangles

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
PATCH = (3, 2)


class Colours:
    """An encoder: mean colours of each patch and of the whole input; records its inputs."""

    def __init__(self, grid):
        self.grid, self.seen = grid, []

    def __call__(self, pixels):
        self.seen.append(pixels)
        rows, columns = self.grid
        patches = F.avg_pool2d(pixels.float(), PATCH)[..., :rows, :columns].flatten(2).mT
        return torch.cat([patches, patches.mean(1, keepdim=True).expand_as(patches)], dim=2).to(pixels.dtype)


def encoded(grid=(4, 6), images=3, dtype=torch.float32, seed=0):
    """A batch whose images have a remaining row of pixels, as if patches did not divide the image."""
    generator = torch.Generator().manual_seed(seed)
    encode = Colours(grid)
    height, width = grid[0] * PATCH[0] + (grid[0] > 1), grid[1] * PATCH[1]
    pixels = torch.randn(images, 3, height, width, generator=generator).to(dtype)
    features = encode(pixels)
    keys = torch.randn(images, features.shape[1], 5, generator=generator).to(dtype)
    encode.seen.clear()
    return EncoderOutput(features, grid, keys_BND=keys, pixels_BCHW=pixels, encode=encode)


@DTYPES
def test_group_means_equal_a_loop(dtype):
    torch.manual_seed(0)
    values = torch.randn(3, 11, 4).to(dtype)
    groups = torch.stack([torch.randperm(11) % 5 for _ in range(3)])
    literal = [
        [values[image][groups[image] == group].float().mean(0) for group in range(5)] for image in range(3)
    ]
    found = group_means(values, groups, 5)
    assert found.dtype == dtype
    torch.testing.assert_close(found, torch.stack([torch.stack(row) for row in literal]).to(dtype))


@DTYPES
@pytest.mark.parametrize("grid", [(4, 6), (7, 3), (1, 5), (1, 1)])
def test_average_pooling_is_the_mean_of_each_rectangle(grid, dtype):
    batch = encoded(grid, dtype=dtype)
    picture = batch.features_BND.reshape(3, *grid, -1).float()
    for k in range(1, batch.tokens + 1):
        keep, merged = AveragePooling().merge(batch, k)
        literal = [
            picture[:, top:bottom, left:right].flatten(1, 2).mean(1)
            for top, bottom, left, right in rectangles(grid, k).tolist()
        ]
        torch.testing.assert_close(merged, torch.stack(literal, 1).to(dtype))
        assert torch.equal(keep, AveragePooling()(batch, k)) and torch.equal(keep, Uniform()(batch, k))


def test_average_pooling_of_equal_squares_equals_torch():
    batch = encoded((12, 12))
    _, merged = AveragePooling().merge(batch, 16)
    pooled = F.avg_pool2d(batch.features_BND.mT.unflatten(2, (12, 12)), 3)
    torch.testing.assert_close(merged, pooled.flatten(2).mT)


@pytest.mark.parametrize("grid", [(1, 1), (4, 6), (9, 2), (1, 9), (24, 24), (27, 27)])
def test_the_small_grid_holds_the_tokens_in_nearly_the_same_aspect_ratio(grid):
    rows, columns = grid
    for k in range(1, rows * columns + 1):
        r, c = small_grid(grid, k)
        assert 1 <= r <= rows and 1 <= c <= columns
        assert 0 <= r * c - k < r  # no whole column is dropped
        exact = math.sqrt(k * rows / columns)
        shapes = [(n, math.ceil(k / n)) for n in range(1, rows + 1) if abs(n - exact) < 1]
        if exact < k:
            assert (r, c) in shapes
            assert r * c == min(n * m for n, m in shapes if m <= columns)
        else:
            assert (r, c) == (k, 1)
    assert small_grid(grid, rows * columns) == grid


def literal_downsampling(batch, k):
    """One image at a time, with Pillow's bicubic filter and loops over pixels."""
    (rows, columns), (height, width) = batch.grid, PATCH
    r, c = small_grid(batch.grid, k)
    top, left = (rows - r) // 2, (columns - c) // 2
    drawn = [(2 * place + 1) * r * c // (2 * k) for place in range(k)]
    places, features = [], []
    for image in batch.pixels_BCHW:
        empty = torch.zeros_like(image)
        for channel, pixels in zip(empty, image, strict=True):
            small = Image.fromarray(pixels.float().numpy()).resize((c * width, r * height), Image.BICUBIC)
            for y in range(r * height):
                for x in range(c * width):
                    channel[top * height + y, left * width + x] = small.getpixel((x, y))
        [tokens] = Colours(batch.grid)(empty[None])
        cells = [divmod(token, c) for token in drawn]
        features.append(torch.stack([tokens[(top + y) * columns + left + x] for y, x in cells]))
        places.append(
            [(2 * y + 1) * rows // (2 * r) * columns + (2 * x + 1) * columns // (2 * c) for y, x in cells]
        )
    return places, torch.stack(features)


@pytest.mark.parametrize("grid", [(4, 6), (5, 3), (1, 4), (1, 1)])
def test_downsampling_equals_its_transcription(grid):
    batch = encoded(grid, images=2)
    for k in range(1, batch.tokens):
        keep, merged = ImageDownsampling().merge(batch, k)
        places, features = literal_downsampling(batch, k)
        assert keep.tolist() == places and torch.equal(keep, ImageDownsampling()(batch, k))
        assert (keep.diff(dim=1) > 0).all()
        torch.testing.assert_close(merged, features, atol=1e-5, rtol=1e-4)


def test_downsampling_keeps_the_features_if_all_tokens_are_kept():
    batch = encoded()
    keep, merged = ImageDownsampling().merge(batch, 24)
    assert torch.equal(merged, batch.features_BND) and keep.tolist() == [list(range(24))] * 3
    assert not batch.encode.seen


def test_downsampling_calls_the_encoder_once_in_its_size_and_precision():
    batch = encoded(dtype=torch.bfloat16)
    _, merged = ImageDownsampling().merge(batch, 7)
    [seen] = batch.encode.seen
    assert seen.shape == batch.pixels_BCHW.shape and seen.dtype == merged.dtype == torch.bfloat16
    ones = replace(batch, pixels_BCHW=torch.ones_like(batch.pixels_BCHW))
    ImageDownsampling().merge(ones, 7)
    shown = batch.encode.seen[-1][0, 0] != 0
    assert small_grid((4, 6), 7) == (2, 4)
    assert shown.sum() == 2 * 4 * PATCH[0] * PATCH[1] and shown[3:9, 2:10].all()


@pytest.mark.parametrize("grid, k", [((4, 6), 7), ((5, 7), 4), ((5, 7), 12), ((3, 6), 8)])
def test_downsampling_pads_as_llava_pads_to_a_square(grid, k):
    """Half of the empty rows and columns are above and on the left, rounded down."""
    batch = encoded(grid)
    ImageDownsampling().merge(replace(batch, pixels_BCHW=torch.ones_like(batch.pixels_BCHW)), k)
    shown = (batch.encode.seen[-1][0, 0] != 0).nonzero()
    (top, left), (bottom, right) = shown.amin(0).tolist(), (shown.amax(0) + 1).tolist()
    (r, c), (height, width) = small_grid(grid, k), PATCH
    assert (bottom - top, right - left) == (r * height, c * width)
    assert (top, left) == ((grid[0] - r) // 2 * height, (grid[1] - c) // 2 * width)


def literal_tome(keys, features, k):
    """Tokens of one image merged in loops, as in the paper: [(position, key, feature, size)]."""
    clusters = [
        (place, key, feature, 1)
        for place, (key, feature) in enumerate(zip(keys.tolist(), features.tolist(), strict=True))
    ]

    def cosine(one, other):
        length = math.hypot(*one) * math.hypot(*other)
        return sum(x * y for x, y in zip(one, other, strict=True)) / length

    def joined(one, other):
        size = one[3] + other[3]
        key, feature = (
            [(one[3] * x + other[3] * y) / size for x, y in zip(one[part], other[part], strict=True)]
            for part in (1, 2)
        )
        return one[0], key, feature, size

    while len(clusters) > k:
        ours, theirs = clusters[::2], clusters[1::2]
        best = [max(range(len(theirs)), key=lambda b: cosine(a[1], theirs[b][1])) for a in ours]
        order = sorted(range(len(ours)), key=lambda a: -cosine(ours[a][1], theirs[best[a]][1]))
        merged = order[: min(len(clusters) - k, len(clusters) // 2)]
        for a in merged:
            theirs[best[a]] = joined(theirs[best[a]], ours[a])
        clusters = sorted([*theirs, *(ours[a] for a in set(order) - set(merged))])
    return [cluster[0] for cluster in clusters], torch.tensor([cluster[2] for cluster in clusters])


@DTYPES
@pytest.mark.parametrize("grid", [(3, 5), (2, 4), (1, 2), (1, 1)])
def test_tome_equals_its_transcription(grid, dtype):
    batch = encoded(grid, dtype=dtype)
    for k in range(1, batch.tokens + 1):
        keep, merged = ToMe().merge(batch, k)
        assert torch.equal(keep, ToMe()(batch, k))
        for image in range(3):
            places, features = literal_tome(batch.keys_BND[image], batch.features_BND[image], k)
            assert keep[image].tolist() == places
            torch.testing.assert_close(merged[image], features.to(dtype))


def test_tome_merges_equal_tokens_first():
    torch.manual_seed(0)
    distinct = torch.randn(2, 6, 4)
    batch = EncoderOutput(distinct.repeat_interleave(2, 1), (3, 4), keys_BND=distinct.repeat_interleave(2, 1))
    keep, merged = ToMe().merge(batch, 6)
    assert keep.tolist() == [[1, 3, 5, 7, 9, 11]] * 2
    torch.testing.assert_close(merged, distinct)


def test_tome_reads_only_the_directions_of_keys():
    batch = encoded()
    scaled = replace(batch, keys_BND=batch.keys_BND * 4.0, features_BND=torch.zeros(3, 24, 2))
    for k in (3, 11, 20):
        assert torch.equal(ToMe()(scaled, k), ToMe()(batch, k))


def test_merged_tokens_are_weighted_by_their_size():
    """A single token is the mean of all, after any number of steps."""
    batch = encoded()
    for reducer in (AveragePooling(), ToMe()):
        torch.testing.assert_close(reducer.merge(batch, 1)[1], batch.features_BND.mean(1, keepdim=True))


def test_which_reducers_merge():
    for reducer in (AveragePooling(), ImageDownsampling(), ToMe()):
        assert isinstance(reducer, Merger) and not isinstance(reducer, Scorer)
    assert not isinstance(Uniform(), Merger)
