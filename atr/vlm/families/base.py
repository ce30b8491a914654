"""What a model family provides, and the encoding of images that all families share.

A family says into which tiles the images were cut, and packs values of the tiles' tokens (features, scores,
marks) into one sequence per image with the model's own code. Shapes: B tiles of all images in order, N tokens
of a tile in raster order, C channels of the packed values, D width, P packed tokens of an image.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from atr.features.attention_hooks import CAPTURABLE, CLASS_TOKENS, capture_attention, leading_tokens
from atr.reduction.base import EncoderOutput


@dataclass(frozen=True)
class Tiling:
    """How a batch of images was cut: the number of `tiles` per image, and the `grid` of tokens in each tile.

    Tile 0 shows the whole image. `sizes` are the (height, width) of the images in pixels before the cut, for
    families that remove padding. `arrangements` are the (rows, columns) of the tiles after tile 0, (0, 0) for
    an image that was not cut.
    """

    tiles: tuple[int, ...]
    grid: tuple[int, int]
    sizes: Any = None
    arrangements: tuple[tuple[int, int], ...] = ()


class Family(Protocol):
    """A model family.

    A family that AutoProcessor does not serve has an attribute `processor` as well: the processor's class.
    """

    image_keys: frozenset[str]
    """The processor's outputs that describe images, which the language model does not read."""

    def tiling(self, model: Any, inputs: Mapping[str, Tensor]) -> Tiling:
        """How the processor cut the images; raises ValueError if pixels and model disagree."""
        ...

    def pack(
        self, model: Any, tiling: Tiling, values_BNC: Tensor, newline_C: Tensor | None, resample: bool
    ) -> list[Tensor]:
        """Values of each image in the order in which the model packs features, (P, C) each.

        `newline_C` is put at the ends of rows, if the family has newlines; None is the model's own newline
        embedding. `resample=False` skips the downsampling of large images, if the family does that.
        """
        ...


def encode(
    model: Any, inputs: Mapping[str, Tensor], tiling: Tiling, needs: Collection[str] = frozenset()
) -> EncoderOutput:
    """Features of each tile at the layer that the model reads, before and after its projector.

    `needs` names the optional fields to fill: attention and keys (of the last layer, if the model reads
    several), pixels, and the encoder. Raises ValueError if the tokens do not fill the grid, because class or
    register tokens are among them, and for attention or keys of a tower of unknown type.
    """
    tower, pixels = model.model.vision_tower, inputs["pixel_values"]
    if pixels.ndim == 5:  # (images, tiles, ...), padded with blank tiles to the largest number of tiles
        pixels = torch.cat([image[:count] for image, count in zip(pixels, tiling.tiles, strict=True)])
    pixels_BCHW = pixels.to(tower.device, tower.dtype)
    signals = set(needs) & set(CAPTURABLE)
    with capture_attention(tower, _layers(model)[-1], *_leading_tokens(tower, signals), signals) as observed:
        features_BND = _features(model, pixels_BCHW)
    fields: dict[str, Any] = {"pixels_BCHW": pixels_BCHW, "encode": partial(_features, model), **observed}
    needed = {name: value for name, value in fields.items() if name in needs}
    projected_BND = project(model, features_BND)
    return EncoderOutput(
        features_BND, tiling.grid, projected_BND=projected_BND, image_key_BX=pixels, **needed
    )


def project(model: Any, features_BND: Tensor) -> Tensor:
    """The tokens that the language model reads: the features after the model's projector.

    The features are cast to the projector's dtype, because the tower may have another one.
    """
    projector = model.model.multi_modal_projector
    floating = (weight.dtype for weight in projector.parameters() if weight.is_floating_point())
    projected_BND: Tensor = projector(features_BND.to(next(floating, model.dtype)))
    return projected_BND


def token_grid(model: Any, pixels: Tensor) -> tuple[int, int]:
    """Rows and columns of tokens of a tile of `pixels` (..., height, width)."""
    rows, columns = (size // model.config.vision_config.patch_size for size in pixels.shape[-2:])
    return rows, columns


def _features(model: Any, pixels_BCHW: Tensor) -> Tensor:
    tower = model.model.vision_tower
    states = tower(pixels_BCHW, output_hidden_states=True, return_dict=True).hidden_states
    features_BND = torch.cat([states[layer] for layer in _layers(model)], dim=-1)
    has_class_token = model.config.vision_feature_select_strategy == "default"
    return features_BND[:, 1:] if has_class_token else features_BND


def _layers(model: Any) -> Sequence[int]:
    layer = model.config.vision_feature_layer
    return [layer] if isinstance(layer, int) else layer


def _leading_tokens(tower: Any, signals: Collection[str]) -> tuple[int, int]:
    """As `leading_tokens`; zeros for any tower if no signal is captured."""
    if not signals:
        return 0, 0
    kind = tower.config.model_type
    if kind not in CLASS_TOKENS:
        allowed = ", ".join(CLASS_TOKENS)
        raise ValueError(f"{min(signals)} is not available from a tower of type {kind}, allowed: {allowed}")
    return leading_tokens(tower.config)
