"""LLaVA 1.5: an image is one tile, whose tokens are packed as they are."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from atr.vlm.families.base import Family, Tiling, token_grid


class Llava:
    """LLaVA 1.5, `model_type` llava."""

    image_keys = frozenset({"pixel_values"})

    def tiling(self, model: Any, inputs: Mapping[str, Tensor]) -> Tiling:
        """One tile per image, of any size."""
        pixels_BCHW = inputs["pixel_values"]
        return Tiling((1,) * len(pixels_BCHW), token_grid(model, pixels_BCHW))

    def pack(
        self, model: Any, tiling: Tiling, values_BNC: Tensor, newline_C: Tensor | None, resample: bool
    ) -> list[Tensor]:
        """The values of each image unchanged."""
        return list(values_BNC)


FAMILY: Family = Llava()
