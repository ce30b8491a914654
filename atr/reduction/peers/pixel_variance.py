"""Tokens whose image patches vary the most."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from atr.core.finite import check_finite
from atr.core.tokens import top_k_BK
from atr.reduction.base import EncoderOutput, Reducer
from atr.reduction.pixel_patches import patch_size

NEEDS = ("grid", "pixels_BCHW")


@dataclass(frozen=True)
class PixelVariance:
    """The tokens whose patches of pixels have the highest variance: a baseline that reads no features."""

    needs: ClassVar[frozenset[str]] = frozenset({"grid", "pixels_BCHW"})
    threshold: ClassVar[float | None] = None

    def __call__(self, encoded: EncoderOutput, budget: int) -> Tensor:
        """Indices of the `budget` patches of the highest variance of each image."""
        return top_k_BK(self.scores(encoded), budget)

    def scores(self, encoded: EncoderOutput) -> Tensor:
        """Variance of a patch's pixels, averaged over channels, float32; scores_BN."""
        (rows, columns), (height, width) = encoded.require_grid(), patch_size(encoded)
        pixels_BCHW = encoded.require("pixels_BCHW")[..., : rows * height, : columns * width].float()
        # (B, channels, rows, height, columns, width)
        patches = pixels_BCHW.reshape(*pixels_BCHW.shape[:2], rows, height, columns, width)
        variance_BN: Tensor = patches.var(dim=(3, 5), correction=0).mean(dim=1).flatten(1)
        check_finite(variance_BN, "reducer PixelVariance: scores")
        return variance_BN.to(encoded.features_BND.device)


def build(seed: int = 0) -> Reducer:
    """Tokens whose image patches vary the most."""
    return PixelVariance()
