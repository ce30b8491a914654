"""Features of images that have grids of their own: concatenated, without padding.

Shapes: see atr.core.tokens; T tokens of all images of a batch.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

Grid = tuple[int, int]
"""(rows, columns) of an image's tokens."""


@dataclass(frozen=True)
class RaggedGrids:
    """The grid of each image of a batch whose tokens follow one another in one sequence.

    Raises ValueError without an image, or for a grid without tokens.
    """

    each: tuple[Grid, ...]

    def __post_init__(self) -> None:
        if not self.each or min(map(min, self.each)) < 1:
            raise ValueError(f"grids: {self.each} are not allowed, allowed: one or more of 1 x 1 and larger")

    def __len__(self) -> int:
        """Number of images."""
        return len(self.each)

    @cached_property
    def tokens(self) -> tuple[int, ...]:
        """Number of tokens of each image."""
        return tuple(rows * columns for rows, columns in self.each)

    def split(self, values: Tensor, dim: int = 1) -> tuple[Tensor, ...]:
        """Views of the images' parts of a tensor with T entries along `dim`."""
        return torch.split(values, list(self.tokens), dim)


@dataclass(frozen=True)
class RaggedFeatures:
    """Features of a batch of images with grids of their own; raises ValueError if the shapes do not fit.

    It goes through torch's loader and Lightning as a tensor does: `pin_memory`, `to` and `float` give a copy.
    """

    features_1TD: Tensor
    grids: RaggedGrids

    def __post_init__(self) -> None:
        shape, tokens = tuple(self.features_1TD.shape), sum(self.grids.tokens)
        if len(shape) != 3 or shape[:2] != (1, tokens):
            raise ValueError(f"features: shape {shape} does not fit, allowed: (1, {tokens}, width)")

    @classmethod
    def of(cls, images: Iterable[tuple[Tensor, Grid]]) -> Self:
        """Concatenate features_ND of images, each given with its grid."""
        parts, grids = zip(*images, strict=True)
        return cls(torch.cat(parts).unsqueeze(0), RaggedGrids(tuple(grids)))

    def __len__(self) -> int:
        """Number of images."""
        return len(self.grids)

    def to(self, device: torch.device) -> Self:
        """The same features on a device; asynchronously from pinned memory."""
        return replace(self, features_1TD=self.features_1TD.to(device, non_blocking=device.type == "cuda"))

    def float(self) -> Self:
        """The same features in float32."""
        return replace(self, features_1TD=self.features_1TD.float())

    def pin_memory(self) -> Self:
        """The same features in pinned memory."""
        return replace(self, features_1TD=self.features_1TD.pin_memory())


def of_each_image(values: Tensor, grids: RaggedGrids | None) -> tuple[Tensor, ...]:
    """The parts of a ragged batch, one for each image; a rectangular batch (`grids` None) as one part."""
    return (values,) if grids is None else grids.split(values)
