"""LLaVA-NeXT: the whole image, then its tiles joined without padding; each row ends with a newline."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from atr.vlm.families._anyres import anyres_tiling, image_sizes
from atr.vlm.families.base import Family, Tiling
from atr.vlm.families.tower import TowerFamily


class LlavaNext(TowerFamily):
    """LLaVA-NeXT, `model_type` llava_next."""

    def image_keys(self, model: Any) -> frozenset[str]:
        """The pixels, and the sizes of the images before the cut."""
        return frozenset({"pixel_values", "image_sizes"})

    def tiling(self, model: Any, inputs: Mapping[str, Tensor]) -> Tiling:
        """The tiles of the resolution that fits each image best."""
        return anyres_tiling(model, inputs, [True] * len(image_sizes(inputs)))

    def pack(
        self, model: Any, tiling: Tiling, values: Sequence[Tensor], newline_C: Tensor | None, resample: bool
    ) -> list[Tensor]:
        """The values as the model's `pack_image_features` packs them."""
        packed, _ = model.model.pack_image_features(
            torch.split(torch.stack(list(values)), list(tiling.tiles)),
            tiling.sizes,
            vision_feature_select_strategy=model.config.vision_feature_select_strategy,
            image_newline=model.model.image_newline if newline_C is None else newline_C,
        )
        return list(packed)


FAMILY: Family = LlavaNext()
