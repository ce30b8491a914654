"""What differs between families of models: how images become the tokens that a language model is fed.

A host encodes images (or tiles) into what a reducer reads, packs features into one sequence of tokens per
image, and says where the kept features lie in that sequence. Everything else about shortening an input is the
same for all families and lives in reduce.py. Shapes: B images or tiles, N tokens of each, D width, K kept.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from atr.reduction.encoded import Encoded


class Host(Protocol):
    """One family; `image_keys` are the processor's outputs that describe images and end with the encoding."""

    image_keys: frozenset[str]

    def encode(self, model: Any, inputs: Mapping[str, Tensor]) -> Encoded:
        """Features of every image or tile at the layer the model reads, before its projector."""

    def pack(self, model: Any, features_BND: Tensor) -> list[Tensor]:
        """The tokens of each image as the language model is fed them, nothing dropped: (tokens, D) each."""

    def place(self, keep_BK: Tensor) -> list[Tensor]:
        """Indices into the packed tokens of each image that stay when `keep_BK` are kept of the features."""


class Llava:
    """LLaVA 1.5: one tile an image, its features through the projector one by one, in raster order."""

    image_keys = frozenset({"pixel_values"})

    def encode(self, model: Any, inputs: Mapping[str, Tensor]) -> Encoded:
        """One row of features an image; raises ValueError where they do not lie on the grid of patches."""
        pixels_BCHW = inputs["pixel_values"].to(model.device, model.dtype)
        tower = model.model.vision_tower(pixels_BCHW, output_hidden_states=True, return_dict=True)
        layer = model.config.vision_feature_layer
        layers = [layer] if isinstance(layer, int) else layer
        features_BND = torch.cat([tower.hidden_states[index] for index in layers], dim=-1)
        if model.config.vision_feature_select_strategy == "default":
            features_BND = features_BND[:, 1:]  # the class token
        rows, columns = (size // model.config.vision_config.patch_size for size in pixels_BCHW.shape[-2:])
        return Encoded(features_BND, (rows, columns))

    def pack(self, model: Any, features_BND: Tensor) -> list[Tensor]:
        """The projector's output."""
        return list(model.model.multi_modal_projector(features_BND))

    def place(self, keep_BK: Tensor) -> list[Tensor]:
        """The same indices: tokens are packed as they come."""
        return list(keep_BK)


HOSTS: dict[str, Host] = {"llava": Llava()}
"""Host of each family, by `model.config.model_type`."""


def host_of(model: Any) -> Host:
    """The host of a model's family; raises ValueError for a family that has none."""
    family = model.config.model_type
    if family not in HOSTS:
        raise ValueError(f"model type {family!r} is not supported, allowed: {', '.join(HOSTS)}")
    return HOSTS[family]
