"""Encodes images by a model's own `get_image_features`, and records a layer of its tower."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def encode_images(
    model: Any, images: Mapping[str, Any], layer: int | None
) -> tuple[Any, list[Tensor] | None]:
    """What `get_image_features` returns, and with a `layer` its pooled patch states (N, D) per tile."""
    if layer is not None:
        raise ValueError(f"layer: {layer} is not allowed for {model.config.model_type}, allowed: merged")
    return model.base_model.get_image_features(**images, return_dict=True), None
