"""Reducers that make new tokens: those of fewer, larger patches, and those of similar ones.

r x c is the grid of a smaller image; the groups of tokens that become one are numbered in raster order of the
token that stands for the group.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from atr.core.tokens import gather, top_k_BK
from atr.reduction.base import EncoderOutput
from atr.reduction.peers._baselines import Uniform, patch, rectangles


@dataclass(frozen=True)
class AveragePooling:
    """The mean of each of `rectangles`, in the place of its middle token."""

    needs: ClassVar[frozenset[str]] = frozenset({"grid"})

    def __call__(self, encoded: EncoderOutput, budget: int) -> Tensor:
        """The places of `Uniform`."""
        return Uniform()(encoded, budget)

    def merge(self, encoded: EncoderOutput, budget: int) -> tuple[Tensor, Tensor]:
        """The places and the means."""
        assert encoded.grid
        features_BND = encoded.features_BND
        group_N = _rectangle_of(encoded.grid, rectangles(encoded.grid, budget)).to(features_BND.device)
        means_BKD = means(features_BND, group_N.expand(len(features_BND), -1), budget)
        return self(encoded, budget), means_BKD


@dataclass(frozen=True)
class ImageDownsampling:
    """The image shrunk to r x c patches, encoded in the middle of an empty one.

    An encoder is given the size it was trained for: what is padded has the processor's mean colour, 0 in the
    tower's pixel values, and goes around the image, as LLaVA's own processor pads an image to a square, so
    that position embeddings are read where images have most of their content. The padding's tokens are
    dropped, and where r c > K as many of the image's own, at even steps of the raster.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"grid", "pixels_BCHW", "encode"})

    def __call__(self, encoded: EncoderOutput, budget: int) -> Tensor:
        """Where in the full image lie the middles of what the tokens show."""
        assert encoded.grid
        (rows, columns), (r, c) = encoded.grid, small_grid(encoded.grid, budget)
        keep_K = _lattice(_even(r, rows), _even(c, columns), columns)[_even(budget, r * c)]
        return keep_K.to(encoded.features_BND.device).repeat(len(encoded.features_BND), 1)

    def merge(self, encoded: EncoderOutput, budget: int) -> tuple[Tensor, Tensor]:
        """The places and the small image's features; with all tokens kept the features there are."""
        keep_BK, features_BND = self(encoded, budget), encoded.features_BND
        if budget == encoded.tokens:
            return keep_BK, features_BND
        assert encoded.grid and encoded.encode and encoded.pixels_BCHW is not None
        (rows, columns), (height, width) = encoded.grid, patch(encoded)
        r, c = small_grid(encoded.grid, budget)
        top, left = (rows - r) // 2, (columns - c) // 2
        placed_BCHW = _placed(encoded.pixels_BCHW, (r * height, c * width), (top * height, left * width))
        small_N = _lattice(top + torch.arange(r), left + torch.arange(c), columns)
        kept_K = small_N[_even(budget, r * c)].to(features_BND.device)
        return keep_BK, encoded.encode(placed_BCHW).to(features_BND)[:, kept_K]


@dataclass(frozen=True)
class ToMe:
    """Token merging by bipartite soft matching (Bolya et al., ICLR 2023, section 3), after the encoder.

    A step splits the tokens alternately into a and b, finds for each of a the most similar of b by the cosine
    of their keys (the mean over heads), and joins the r most similar pairs. A joined token is the mean of the
    tokens it stands for (the paper's size-weighted mean), and so is its key. The paper merges r tokens in
    every layer; after the encoder no layer is left, and steps of r <= n / 2 of the n tokens left follow each
    other until K are. The paper leaves open in which order a step splits what another joined: here that of
    the raster, a joined token in the place of the one of b.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"keys_BND"})

    def __call__(self, encoded: EncoderOutput, budget: int) -> Tensor:
        """The places of the tokens that others were joined to, or that stayed alone."""
        return self._matched(encoded, budget)[0]

    def merge(self, encoded: EncoderOutput, budget: int) -> tuple[Tensor, Tensor]:
        """The places and the means of the tokens joined there."""
        keep_BK, group_BN = self._matched(encoded, budget)
        return keep_BK, means(encoded.features_BND, group_BN, budget)

    def _matched(self, encoded: EncoderOutput, budget: int) -> tuple[Tensor, Tensor]:
        assert encoded.keys_BND is not None
        # No product is sure of its last bits in another batch: rounded from double precision, ties stay ties.
        keys_BND = encoded.keys_BND.double()
        keep_BG = group_BN = torch.arange(encoded.tokens, device=keys_BND.device).repeat(len(keys_BND), 1)
        while (groups := keep_BG.shape[1]) > budget:
            joined_BG = _step(means(keys_BND, group_BN, groups), min(groups - budget, groups // 2))
            stays_BG = joined_BG == torch.arange(groups, device=joined_BG.device)
            group_BN = (stays_BG.cumsum(dim=1) - 1).gather(1, joined_BG).gather(1, group_BN)
            keep_BG = keep_BG[stays_BG].reshape(len(keep_BG), -1)
        return keep_BG, group_BN


def means(values_BND: Tensor, group_BN: Tensor, groups: int) -> Tensor:
    """Mean of the tokens of each group, none of them empty, summed in float32 or better; (B, groups, D)."""
    sizes_BG = torch.zeros(len(group_BN), groups, dtype=torch.int64, device=group_BN.device)
    sizes_BG.scatter_add_(1, group_BN, torch.ones_like(group_BN))
    # Sorted, because sums that are scattered come in any order on a GPU.
    sorted_BND = gather(values_BND, group_BN.argsort(dim=1, stable=True))
    precise_BND = sorted_BND.to(torch.promote_types(values_BND.dtype, torch.float32))
    means_BGD: Tensor = torch.segment_reduce(precise_BND, "mean", lengths=sizes_BG, axis=1)
    return means_BGD.to(values_BND.dtype)


def small_grid(grid: tuple[int, int], count: int) -> tuple[int, int]:
    """Rows r and columns c of a grid of the same shape, about, that holds `count` tokens.

    Of r rounded down and up from sqrt(count R / C) the one with fewer cells, c = count / r rounded up.
    """
    rows, columns = grid
    exact = min(math.sqrt(count * rows / columns), count)
    shapes = [(r, math.ceil(count / r)) for r in (math.ceil(exact), math.floor(exact)) if r]
    return min((shape for shape in shapes if shape[1] <= columns), key=math.prod)


def _rectangle_of(grid: tuple[int, int], rectangles_K4: Tensor) -> Tensor:
    """Which rectangle each token lies in; int64 (N,)."""
    row_N, column_N = torch.cartesian_prod(*(torch.arange(side) for side in grid)).unbind(dim=1)
    top_K1, bottom_K1, left_K1, right_K1 = rectangles_K4[..., None].unbind(dim=1)
    inside_KN = (top_K1 <= row_N) & (row_N < bottom_K1) & (left_K1 <= column_N) & (column_N < right_K1)
    return inside_KN.int().argmax(dim=0)


def _even(count: int, cells: int) -> Tensor:
    """The middles of `count` equal parts of a line of cells; int64 (count,), distinct for count <= cells."""
    return (2 * torch.arange(count) + 1) * cells // (2 * count)


def _lattice(row_R: Tensor, column_C: Tensor, columns: int) -> Tensor:
    """Where these rows and columns of a grid of `columns` columns cross; indices in raster order (R C,)."""
    return (row_R[:, None] * columns + column_C).flatten()


def _placed(pixels_BCHW: Tensor, size: tuple[int, int], corner: tuple[int, int]) -> Tensor:
    """The images shrunk to a size in pixels, their upper left corner at a pixel, zeros around."""
    (height, width), (top, left) = size, corner
    # On the CPU there is no antialiasing in half precision. Bicubic, as the towers' own processors.
    small = F.interpolate(pixels_BCHW.float(), size, mode="bicubic", antialias=True)
    placed_BCHW = torch.zeros_like(pixels_BCHW)
    placed_BCHW[..., top : top + height, left : left + width] = small
    return placed_BCHW


def _step(keys_BGD: Tensor, count: int) -> Tensor:
    """One step of the matching: for each group the one it becomes part of, itself for most; int64 (B, G)."""
    unit_BGD = F.normalize(keys_BGD, dim=-1)
    similarity_BAb = (unit_BGD[:, ::2] @ unit_BGD[:, 1::2].mT).float()
    best_BA, into_BA = similarity_BAb.max(dim=-1)
    merged_BR = top_k_BK(best_BA, count)
    joined_BG = torch.arange(keys_BGD.shape[1], device=keys_BGD.device).repeat(len(keys_BGD), 1)
    return joined_BG.scatter_(1, 2 * merged_BR, 2 * into_BA.gather(1, merged_BR) + 1)
