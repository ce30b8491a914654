"""A budget split over the parts of an image, such as crops or tiles; C parts."""

import torch
from torch import Tensor

from atr.reduction.arguments import check_budget
from atr.reduction.similarity import precise


def quotas_BC(total: int, weights_BC: Tensor, sizes_C: Tensor) -> Tensor:
    """Split `total` over parts in proportion to non-negative weights; int64 (B, C).

    The counts of a row sum to `total` and none is above its part's size: the excess of a part is shared by
    the others in proportion to their weights, or to their sizes if all their weights are zero. Counts are
    rounded by largest remainder, ties to the first part. Raises ValueError if `total` exceeds the sizes.
    """
    check_budget(total, int(sizes_C.sum()))
    weights_BC = precise(weights_BC)
    share_BC = _shares_BC(total, weights_BC, sizes_C.to(weights_BC).expand_as(weights_BC))
    whole_BC = share_BC.floor()
    # Compared in float32, so that remainders that differ by rounding alone are equal.
    rest_BC = (share_BC - whole_BC).float()
    place_BC = rest_BC.sort(dim=1, descending=True, stable=True).indices.argsort(dim=1)
    return whole_BC.long() + (place_BC < total - whole_BC.sum(dim=1, keepdim=True))


def _shares_BC(total: int, weights_BC: Tensor, sizes_BC: Tensor) -> Tensor:
    """The split before rounding."""
    share_BC, full_BC = torch.zeros_like(weights_BC), torch.zeros_like(weights_BC, dtype=torch.bool)
    for _ in range(sizes_BC.shape[1]):  # each round fills a part, or is the last to change anything
        left_B1 = total - sizes_BC.where(full_BC, 0).sum(dim=1, keepdim=True)
        open_BC = weights_BC.masked_fill(full_BC, 0)
        open_BC = open_BC.where(open_BC.sum(dim=1, keepdim=True) > 0, sizes_BC.masked_fill(full_BC, 0))
        in_all_B1 = open_BC.sum(dim=1, keepdim=True)
        share_BC = sizes_BC.where(full_BC, left_B1 * open_BC / in_all_B1.where(in_all_B1 > 0, 1))
        full_BC = full_BC | (share_BC >= sizes_BC)
    return share_BC


def parts_N(grid: tuple[int, int], parts: tuple[int, int]) -> Tensor:
    """Index of the part that each token lies in, the grid cut into rows and columns of parts; int64 (N,).

    Parts are as equal as possible; a token on a border belongs to the part of its upper left corner.
    """
    row, column = (torch.arange(cells) * count // cells for cells, count in zip(grid, parts, strict=True))
    return (row[:, None] * parts[1] + column).flatten()
