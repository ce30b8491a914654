"""The grid of tokens cut into rectangles; R rows, C columns, K rectangles."""

import math

import torch
from torch import Tensor

from atr.reduction.base import EncoderOutput


def rectangles(grid: tuple[int, int], count: int) -> Tensor:
    """The grid cut into `count` rectangles of nearly equal area: top, bottom, left, right; int64 (K, 4).

    For R <= C the rows are cut into bands whose heights differ by one at most: round(sqrt(K R / C)) bands, or
    more if a band would be higher than the mean area N / K. Each band has a share of the K rectangles in
    proportion to its height, and their widths differ by one at most. No area is twice the mean. Bounds are
    rounded, so that the cut is symmetric unless an exact bound is a half. For R > C the transpose is cut.
    The rectangles come in raster order of their `middles`. Defined for 1 <= count <= N.
    """
    rows, columns = grid
    if rows > columns:
        turned_K4 = rectangles((columns, rows), count)[:, [2, 3, 0, 1]]
        return turned_K4[middles(turned_K4, grid).argsort()]
    mean_area = rows * columns // count
    bands = max(round(math.sqrt(count * rows / columns)), math.ceil(rows / mean_area))
    bound = _share(torch.arange(bands + 1), rows, bands)
    before = _share(bound, count, rows)  # rectangles above a bound
    band_K = torch.arange(bands).repeat_interleave(before.diff())
    place_K, parts_K = torch.arange(count) - before[band_K], before.diff()[band_K]
    left_K, right_K = (_share(place_K + side, columns, parts_K) for side in (0, 1))
    return torch.stack([bound[band_K], bound[band_K + 1], left_K, right_K], dim=1)


def middles(rectangles_K4: Tensor, grid: tuple[int, int]) -> Tensor:
    """Index of the token at the middle of each rectangle, the lower right one of several; int64 (K,)."""
    top_K, bottom_K, left_K, right_K = rectangles_K4.unbind(dim=1)
    return (top_K + bottom_K) // 2 * grid[1] + (left_K + right_K) // 2


def middle_tokens_BK(encoded: EncoderOutput, budget: int) -> Tensor:
    """The middle tokens of `budget` rectangles, the same in each image of the batch."""
    grid, features_BND = encoded.require_grid(), encoded.features_BND
    keep_K = middles(rectangles(grid, budget), grid)
    return keep_K.to(features_BND.device).repeat(len(features_BND), 1)


def rectangle_of_N(grid: tuple[int, int], rectangles_K4: Tensor) -> Tensor:
    """Index of the rectangle that each token lies in; int64 (N,)."""
    row_N, column_N = torch.cartesian_prod(*(torch.arange(side) for side in grid)).unbind(dim=1)
    top_K1, bottom_K1, left_K1, right_K1 = rectangles_K4[..., None].unbind(dim=1)
    inside_KN = (top_K1 <= row_N) & (row_N < bottom_K1) & (left_K1 <= column_N) & (column_N < right_K1)
    return inside_KN.int().argmax(dim=0)


def _share(part: Tensor, whole: int, parts: Tensor | int) -> Tensor:
    """`whole` * part / parts, rounded half up."""
    return (2 * whole * part + parts) // (2 * parts)
