"""Where kept tokens lie in the original image: a rectangle in pixels for each of them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from atr.vlm.reduce import Kept
from atr.vlm.views import Shown, View, find_views


def token_boxes(kept: Kept, size: tuple[int, int], processor: Any) -> Tensor:
    """The rectangle of each kept token in pixels of the image: left, top, right, bottom; float32 (tokens, 4).

    `kept` is an item of `Reduced.kept`, `size` the (width, height) of its image as `Image.size` gives it, and
    `processor` what made the input, whose settings say how it resized, cropped and tiled the image. Rows are
    in the order of `kept.indices_K`, without newlines, which have no place. A token that stands for padding
    alone has a rectangle without area at the image's border.

    Raises ValueError, one line, for an image processor of unknown geometry, for a size that the processor
    would cut or resize otherwise, and for a family whose tokens have no place in the image.
    """
    if not kept.tiles:
        raise ValueError("kept: the tokens of this family have no place in the image")
    width, height = _checked_size(size)
    views = find_views(processor, Shown(width, height, kept.tiles, kept.of))
    box_P4 = torch.cat([_divide(view) for view in views])
    box_K4 = box_P4[kept.indices_K.to(box_P4.device)]
    limit_4 = torch.tensor([width, height, width, height], dtype=box_K4.dtype)
    return box_K4[~box_K4[:, 0].isnan()].clamp(min=0).minimum(limit_4).float()


def _checked_size(size: Sequence[int]) -> tuple[int, int]:
    try:
        width, height = map(int, size)
    except (TypeError, ValueError):
        width = height = 0
    if min(width, height) < 1:
        raise ValueError(f"size: {size!r} is not allowed, allowed: (width, height) in pixels, as Image.size")
    return width, height


def _divide(view: View) -> Tensor:
    """The rectangles of a view's tokens in raster order, NaN for newlines; float64 (P, 4)."""
    left, top, right, bottom = view.rectangle
    rows, columns = view.grid
    y_R = torch.linspace(top, bottom, rows + 1, dtype=torch.float64)
    x_C = torch.linspace(left, right, columns + 1, dtype=torch.float64)
    box_RC4 = torch.full((rows, columns + view.row_ends, 4), torch.nan, dtype=torch.float64)
    for side, edge_RC in enumerate((x_C[:-1], y_R[:-1, None], x_C[1:], y_R[1:, None])):
        box_RC4[:, :columns, side] = edge_RC
    return torch.cat([box_RC4.flatten(0, 1), box_RC4.new_full((view.ends, 4), torch.nan)])
