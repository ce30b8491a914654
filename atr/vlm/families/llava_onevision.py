"""LLaVA-OneVision: as LLaVA-NeXT, with large grids downsampled; a sample's images are not cut if several."""

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaOnevisionProcessor, ProcessorMixin

from atr.vlm.families._anyres import anyres_tiling, image_sizes
from atr.vlm.families.base import Family, Tiling
from atr.vlm.families.tower import TowerFamily

# More tiles than any image has, so that `pack_image_features` downsamples none.
_NEVER_RESAMPLED = "anyres_max_1000000"


class OnevisionImageProcessor(LlavaOnevisionProcessor):  # type: ignore[misc]  # untyped there
    """LLaVA-OneVision's processor without its video part, which needs torchvision."""

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        num_image_tokens: int | None = None,
        vision_feature_select_strategy: str | None = None,
        chat_template: str | None = None,
        image_token: str = "<image>",
        video_token: str = "<video>",
        vision_aspect_ratio: str = "anyres_max_9",
    ) -> None:
        self.num_image_tokens = num_image_tokens
        self.vision_feature_select_strategy = vision_feature_select_strategy
        self.image_token, self.video_token = image_token, video_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(video_token)
        self.vision_aspect_ratio = vision_aspect_ratio
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


class LlavaOnevision(TowerFamily):
    """LLaVA-OneVision, `model_type` llava_onevision."""

    def image_keys(self, model: Any) -> frozenset[str]:
        """The pixels, the sizes before the cut, and the number of images of each sample."""
        return frozenset({"pixel_values", "image_sizes", "batch_num_images"})

    processor = OnevisionImageProcessor

    def tiling(self, model: Any, inputs: Mapping[str, Tensor]) -> Tiling:
        """The tiles of the resolution that fits an image best; one tile if its sample has several images."""
        images = torch.as_tensor(inputs.get("batch_num_images", [1] * len(image_sizes(inputs)))).tolist()
        return anyres_tiling(model, inputs, list(chain.from_iterable([n == 1] * n for n in images)))

    def pack(
        self, model: Any, tiling: Tiling, values: Sequence[Tensor], newline_C: Tensor | None, resample: bool
    ) -> list[Tensor]:
        """The values as the model's `pack_image_features` packs them; `resample=False` raises its limit."""
        packed, _ = model.model.pack_image_features(
            torch.split(torch.stack(list(values)), list(tiling.tiles)),
            tiling.sizes,
            image_newline=model.model.image_newline if newline_C is None else newline_C,
            vision_aspect_ratio=model.config.vision_aspect_ratio if resample else _NEVER_RESAMPLED,
        )
        return list(packed)


FAMILY: Family = LlavaOnevision()
