"""Reducers that learn nothing and hardly look: the lines every curve is read against.

R rows and C columns of the grid. Those that make new tokens are in `atr.reduction.peers._merging`.
"""

import math
import zlib
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from atr.core.finite import check_finite
from atr.core.tokens import top_k_BK
from atr.reduction.base import EncoderOutput


@dataclass(frozen=True)
class Full:
    """All tokens, in place; defined for budget N alone (ValueError otherwise)."""

    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, encoded: EncoderOutput, budget: int) -> Tensor:
        """All indices of each image."""
        if budget != encoded.tokens:
            raise ValueError(f"reducer full: budget {budget} is not allowed, allowed: all {encoded.tokens}")
        features_BND = encoded.features_BND
        return torch.arange(budget, device=features_BND.device).repeat(len(features_BND), 1)


@dataclass(frozen=True)
class NoImage:
    """No token at all; defined for budget 0 alone (ValueError otherwise)."""

    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, encoded: EncoderOutput, budget: int) -> Tensor:
        """No index for each image."""
        if budget != 0:
            raise ValueError(f"reducer none: budget {budget} is not allowed, allowed: 0")
        features_BND = encoded.features_BND
        return torch.empty(len(features_BND), 0, dtype=torch.int64, device=features_BND.device)


@dataclass(frozen=True)
class Random:
    """Distinct tokens uniformly at random, the same for the same seed and image whatever the batch.

    A smaller budget keeps a subset of a larger one's tokens, so that the points of a curve are paired.
    """

    seed: int = 0
    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, encoded: EncoderOutput, budget: int) -> Tensor:
        """`budget` indices of each image; raises ValueError unless 0 <= budget <= N."""
        if not 0 <= budget <= encoded.tokens:
            raise ValueError(f"budget: {budget} is out of range, allowed: 0 to {encoded.tokens} tokens")
        # Of computed features the last bit may hang on the batch, and then all of a draw by them.
        image_key_BX = encoded.features_BND if encoded.image_key_BX is None else encoded.image_key_BX
        rows = [
            self._order(image_key_X, encoded.tokens)[:budget].sort().values for image_key_X in image_key_BX
        ]
        return torch.stack(rows).to(encoded.features_BND.device)

    def _order(self, image_key_X: Tensor, tokens: int) -> Tensor:
        # Seeded by the image's own content: neither its place in the batch nor the process can matter.
        content = image_key_X.detach().cpu().contiguous().view(torch.uint8).numpy()
        # The seed starts the checksum, as a CPU generator looks at no more than 32 bits of its own seed.
        generator = torch.Generator().manual_seed(zlib.crc32(content.data, self.seed))
        return torch.randperm(tokens, generator=generator)


@dataclass(frozen=True)
class Uniform:
    """The middle tokens of `rectangles`: an even two-dimensional stride for every budget."""

    needs: ClassVar[frozenset[str]] = frozenset({"grid"})

    def __call__(self, encoded: EncoderOutput, budget: int) -> Tensor:
        """The same `budget` places in each image."""
        assert encoded.grid
        features_BND = encoded.features_BND
        keep_K = middles(rectangles(encoded.grid, budget), encoded.grid)
        return keep_K.to(features_BND.device).repeat(len(features_BND), 1)


@dataclass(frozen=True)
class L2Norm:
    """The tokens of the largest norm."""

    needs: ClassVar[frozenset[str]] = frozenset()
    threshold: ClassVar[float | None] = None

    def __call__(self, encoded: EncoderOutput, budget: int) -> Tensor:
        """Indices of the `budget` largest norms of each image."""
        return top_k_BK(self.scores(encoded), budget)

    def scores(self, encoded: EncoderOutput) -> Tensor:
        """||x||, float32; scores_BN."""
        norms_BN: Tensor = torch.linalg.vector_norm(encoded.features_BND, dim=-1, dtype=torch.float32)
        check_finite(norms_BN, "reducer L2Norm: scores")  # squares of finite features may overflow
        return norms_BN


@dataclass(frozen=True)
class PixelVariance:
    """The tokens whose own patches vary the most: what can be told without an encoder."""

    needs: ClassVar[frozenset[str]] = frozenset({"grid", "pixels_BCHW"})
    threshold: ClassVar[float | None] = None

    def __call__(self, encoded: EncoderOutput, budget: int) -> Tensor:
        """Indices of the `budget` patches of the highest variance of each image."""
        return top_k_BK(self.scores(encoded), budget)

    def scores(self, encoded: EncoderOutput) -> Tensor:
        """Variance of a patch's pixels, the mean over channels, float32; scores_BN."""
        assert encoded.grid and encoded.pixels_BCHW is not None
        (rows, columns), (height, width) = encoded.grid, patch(encoded)
        pixels_BCHW = encoded.pixels_BCHW[..., : rows * height, : columns * width].float()
        # (B, channels, R, height, C, width)
        patches = pixels_BCHW.reshape(*pixels_BCHW.shape[:2], rows, height, columns, width)
        variance_BN: Tensor = patches.var(dim=(3, 5), correction=0).mean(dim=1).flatten(1)
        check_finite(variance_BN, "reducer PixelVariance: scores")
        return variance_BN.to(encoded.features_BND.device)


def patch(encoded: EncoderOutput) -> tuple[int, int]:
    """Height and width of a token's patch in pixels.

    A tower leaves out what pixels remain at the bottom and the right, taken to be fewer than it has rows and
    columns (384 / 14: 6 of 27). Raises ValueError for fewer pixels than tokens.
    """
    assert encoded.grid and encoded.pixels_BCHW is not None
    (rows, columns), (height, width) = encoded.grid, encoded.pixels_BCHW.shape[2:]
    if height < rows or width < columns:
        raise ValueError(
            f"pixels_BCHW: {height} x {width} pixels, allowed: at least {rows} x {columns} tokens"
        )
    return height // rows, width // columns


def rectangles(grid: tuple[int, int], count: int) -> Tensor:
    """The grid cut into `count` rectangles of nearly equal area: top, bottom, left, right; int64 (K, 4).

    For R <= C the rows are cut into bands whose heights differ by one at most: sqrt(K R / C) bands, rounded,
    or more, so that none is higher than the mean area N / K. A band has its share of the K rectangles by its
    height, and their widths differ by one at most. No area is twice the mean. Bounds are the exact ones
    rounded, so that the cut is symmetric unless one of these is a half. Where R > C the transpose is cut.
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


def _share(part: Tensor, whole: int, parts: Tensor | int) -> Tensor:
    """Give `whole` * part / parts, rounded, a half up."""
    return (2 * whole * part + parts) // (2 * parts)
