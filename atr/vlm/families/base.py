"""What a model family provides, and how the processor's tiles are described.

A family says into which tiles the images were cut, encodes them, and packs values of the tiles' tokens
(features, scores, marks) into one sequence per image. A token is what the language model is fed: one patch in
LLaVA, 4, 9 or 16 merged patches elsewhere. Shapes: N tokens of a tile in raster order, C channels of the
packed values, D width, P packed tokens of an image.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any, Protocol, Self

from torch import Tensor

from atr.core.ragged import Grid
from atr.core.tower_layer import TowerLayer
from atr.vlm.encoded_tiles import EncodedTiles
from atr.vlm.image_tokens import ImageTokens

Layer = TowerLayer | None
"""Which features of an image a selector reads: those of a layer of the tower, the merged tokens, or those
that the model itself reads."""


@dataclass(frozen=True)
class Tiling:
    """How a batch of images was cut: the number of `tiles` per image, and the grid of tokens of each tile.

    `grids` are in the order in which the tiles are packed. `sizes` are the (height, width) of the images in
    pixels before the cut, for families that remove padding. `arrangements` are the (rows, columns) of the
    tiles after tile 0, (0, 0) for an image that was not cut, in families whose tile 0 shows the whole image.
    """

    tiles: tuple[int, ...]
    grids: tuple[Grid, ...]
    sizes: Any = None
    arrangements: tuple[Grid, ...] = ()

    @classmethod
    def of_one_grid(
        cls, tiles: Sequence[int], grid: Grid, sizes: Any = None, arrangements: Sequence[Grid] = ()
    ) -> Self:
        """A tiling whose tiles all have the same grid."""
        return cls(tuple(tiles), (grid,) * sum(tiles), sizes, tuple(arrangements))

    @property
    def grid(self) -> Grid:
        """The grid that all tiles have; only for families of one grid."""
        (grid,) = set(self.grids)
        return grid

    @property
    def firsts(self) -> list[int]:
        """The number of each image's first tile, and the number of all tiles."""
        return [0, *accumulate(self.tiles)]

    def tiles_of(self, images: Sequence[int]) -> list[int]:
        """The numbers of the tiles of some images, in the given order; an image may occur more than once."""
        firsts = self.firsts
        return list(chain.from_iterable(range(firsts[image], firsts[image + 1]) for image in images))

    def of(self, images: Sequence[int]) -> "Tiling":
        """The tiling of some of the images, in the given order; an image may occur more than once."""
        return Tiling(
            tuple(self.tiles[image] for image in images),
            tuple(self.grids[tile] for tile in self.tiles_of(images)),
            None if self.sizes is None else [self.sizes[image] for image in images],
            tuple(self.arrangements[image] for image in images) if self.arrangements else (),
        )


class Family(Protocol):
    """A model family.

    A family that AutoProcessor does not serve has an attribute `processor` as well: the processor's class.
    Families with a vision tower and a projector, as LLaVA has them, take `encode` from
    `atr.vlm.families.tower.TowerFamily`.
    """

    def image_keys(self, model: Any) -> frozenset[str]:
        """The processor's outputs that describe images, which the language model does not read."""
        ...

    def tiling(self, model: Any, inputs: Mapping[str, Tensor]) -> Tiling:
        """How the processor cut the images; raises ValueError if pixels, placeholders and model disagree."""
        ...

    def encode(
        self,
        model: Any,
        inputs: Mapping[str, Tensor],
        tiling: Tiling,
        needs: Collection[str] = frozenset(),
        layer: Layer = None,
    ) -> EncodedTiles:
        """Features of each tile at a layer, and its tokens as the language model reads them.

        `needs` names the optional fields of EncoderOutput to fill. Raises ValueError for a layer or a field
        that the family cannot give.
        """
        ...

    def pack(
        self,
        model: Any,
        tiling: Tiling,
        values: Sequence[Tensor],
        newline_C: Tensor | None,
        resample: bool,
    ) -> list[Tensor]:
        """Values (N, C) of each tile in the order in which the model packs features, (P, C) per image.

        `newline_C` is put at the ends of rows, if the family has newlines; None is the model's own newline
        embedding. `resample=False` skips the downsampling of large images, if the family does that.
        """
        ...

    def tokens(self, model: Any, tiling: Tiling, encoded: EncodedTiles, resample: bool) -> ImageTokens:
        """All tokens of each image as the language model reads them."""
        ...

    def project(self, model: Any, features_BND: Tensor) -> Tensor:
        """Features that a merging reducer made, as tokens of the language model."""
        ...
