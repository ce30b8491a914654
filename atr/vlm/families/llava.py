"""LLaVA 1.5: an image is one tile, whose tokens are packed as they are."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from atr.vlm.families.base import Family, Tiling
from atr.vlm.families.pixel_checks import check_tiles
from atr.vlm.families.tower import TowerFamily, token_grid


class Llava(TowerFamily):
    """LLaVA 1.5, `model_type` llava."""

    def image_keys(self, model: Any) -> frozenset[str]:
        """The pixels alone."""
        return frozenset({"pixel_values"})

    def tiling(self, model: Any, inputs: Mapping[str, Tensor]) -> Tiling:
        """One tile per image, of any size."""
        pixels_BCHW = inputs["pixel_values"]
        check_tiles(pixels_BCHW)
        return Tiling.of_one_grid((1,) * len(pixels_BCHW), token_grid(model, pixels_BCHW))

    def pack(
        self, model: Any, tiling: Tiling, values: Sequence[Tensor], newline_C: Tensor | None, resample: bool
    ) -> list[Tensor]:
        """The values of each image unchanged."""
        return list(values)


FAMILY: Family = Llava()
