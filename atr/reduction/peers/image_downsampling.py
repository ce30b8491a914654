"""The image itself encoded at a lower resolution; r x c is the grid of the smaller image."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from atr.reduction.base import EncoderOutput, Reducer
from atr.reduction.pixel_patches import patch_size

MERGES = True
NEEDS = ("encode", "grid", "pixels_BCHW")
ONE_TILE = True


@dataclass(frozen=True)
class ImageDownsampling:
    """The image shrunk to r x c patches and encoded in the middle of an empty image of the full size.

    The encoder thus receives the size it was trained for. The padding has the processor's mean colour, 0 in
    pixel values, and surrounds the image, as LLaVA's processor pads an image to a square: the image gets the
    position embeddings where images have most of their content. The padding's tokens are dropped, and so are
    r c - K of the image's own tokens, at even steps of the raster.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"grid", "pixels_BCHW", "encode"})

    def __call__(self, encoded: EncoderOutput, budget: int) -> Tensor:
        """Positions in the full image of the middles of the smaller image's tokens."""
        (rows, columns), (r, c) = encoded.require_grid(), small_grid(encoded.require_grid(), budget)
        keep_K = _lattice(_even(r, rows), _even(c, columns), columns)[_even(budget, r * c)]
        return keep_K.to(encoded.features_BND.device).repeat(len(encoded.features_BND), 1)

    def merge(self, encoded: EncoderOutput, budget: int) -> tuple[Tensor, Tensor]:
        """The positions and the smaller image's features; the given features if all tokens are kept."""
        keep_BK, features_BND = self(encoded, budget), encoded.features_BND
        if budget == encoded.tokens:
            return keep_BK, features_BND
        assert encoded.encode, "named in needs"
        (rows, columns), (height, width) = encoded.require_grid(), patch_size(encoded)
        r, c = small_grid((rows, columns), budget)
        top, left = (rows - r) // 2, (columns - c) // 2
        pixels_BCHW = encoded.require("pixels_BCHW")
        padded_BCHW = _shrunk_and_padded(pixels_BCHW, (r * height, c * width), (top * height, left * width))
        small_N = _lattice(top + torch.arange(r), left + torch.arange(c), columns)
        kept_K = small_N[_even(budget, r * c)].to(features_BND.device)
        return keep_BK, encoded.encode(padded_BCHW).to(features_BND)[:, kept_K]


def small_grid(grid: tuple[int, int], count: int) -> tuple[int, int]:
    """Rows r and columns c of a grid of nearly the same aspect ratio that holds `count` tokens.

    r is sqrt(count R / C) rounded down or up, c is count / r rounded up; the pair with fewer cells is taken.
    """
    rows, columns = grid
    exact = min(math.sqrt(count * rows / columns), count)
    shapes = [(r, math.ceil(count / r)) for r in (math.ceil(exact), math.floor(exact)) if r]
    return min((shape for shape in shapes if shape[1] <= columns), key=math.prod)


def _even(count: int, cells: int) -> Tensor:
    """The middles of `count` equal parts of a line of cells; int64 (count,), distinct for count <= cells."""
    return (2 * torch.arange(count) + 1) * cells // (2 * count)


def _lattice(row_R: Tensor, column_C: Tensor, columns: int) -> Tensor:
    """Indices at which these rows and columns of a grid cross, in raster order; int64 (R C,)."""
    return (row_R[:, None] * columns + column_C).flatten()


def _shrunk_and_padded(pixels_BCHW: Tensor, size: tuple[int, int], corner: tuple[int, int]) -> Tensor:
    """The images shrunk to a size in pixels, their upper left corner at a pixel, zeros around."""
    (height, width), (top, left) = size, corner
    # float32, because the CPU has no antialiasing in half precision; bicubic, as the encoders' processors.
    small = F.interpolate(pixels_BCHW.float(), size, mode="bicubic", antialias=True)
    padded_BCHW = torch.zeros_like(pixels_BCHW)
    padded_BCHW[..., top : top + height, left : left + width] = small
    return padded_BCHW


def build(seed: int = 0) -> Reducer:
    """The image at a lower resolution."""
    return ImageDownsampling()
