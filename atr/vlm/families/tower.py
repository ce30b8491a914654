"""The encoding of images that families with a vision tower and a projector share, as LLaVA has them.

Shapes: B tiles of all images in order, N tokens of a tile in raster order, D width.
"""

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from atr.core.ragged import Grid
from atr.features.attention_hooks import CAPTURABLE, CLASS_TOKENS, capture_attention, leading_tokens
from atr.reduction.base import EncoderOutput
from atr.vlm.encoded_tiles import EncodedTiles
from atr.vlm.families.base import Family, Layer, Tiling
from atr.vlm.image_tokens import ImageTokens


class TowerFamily:
    """Encoding and tokens of a family whose images pass a vision tower and then a projector.

    A family adds `image_keys`, `tiling` and `pack` of `atr.vlm.families.base.Family`.
    """

    def encode(
        self,
        model: Any,
        inputs: Mapping[str, Tensor],
        tiling: Tiling,
        needs: Collection[str] = frozenset(),
        layer: Layer = None,
    ) -> EncodedTiles:
        """Features of each tile at the layer that the model reads, before and after its projector.

        Raises ValueError for a `layer` other than that, and as `encode_tiles` does.
        """
        if layer is not None:
            own = model.config.vision_feature_layer
            raise ValueError(
                f"layer: {layer!r} is not allowed for {model.config.model_type}, it reads layer {own}"
            )
        return EncodedTiles.of_one_grid(encode_tiles(model, inputs, tiling, needs))

    def tokens(
        self: Family, model: Any, tiling: Tiling, encoded: EncodedTiles, resample: bool
    ) -> ImageTokens:
        """The packed tokens behind the projector, with the model's newlines."""
        projected = list(encoded.whole.require("projected_BND"))
        return ImageTokens(self.pack(model, tiling, projected, None, resample))

    def project(self, model: Any, features_BND: Tensor) -> Tensor:
        """As the function `project` of this module."""
        return project(model, features_BND)


def encode_tiles(
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
        states = _states(model, pixels_BCHW)
    features_BND = _join(model, states)
    fields: dict[str, Any] = {"pixels_BCHW": pixels_BCHW, "encode": partial(_features, model), **observed}
    needed = {name: value for name, value in fields.items() if name in needs}
    # As the model does it: in bfloat16, a product's bits depend on the layout of the values in memory.
    own_BND = _without_class(model, states[0]) if len(states) == 1 else features_BND
    projected_BND = project(model, own_BND)
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


def token_grid(model: Any, pixels: Tensor) -> Grid:
    """Rows and columns of tokens of a tile of `pixels` (..., height, width)."""
    rows, columns = (size // model.config.vision_config.patch_size for size in pixels.shape[-2:])
    return rows, columns


def _features(model: Any, pixels_BCHW: Tensor) -> Tensor:
    return _join(model, _states(model, pixels_BCHW))


def _states(model: Any, pixels_BCHW: Tensor) -> list[Tensor]:
    """The tower's states at each of the layers that the model reads, class token included."""
    tower, layers = model.model.vision_tower, _layers(model)
    # The layers by number: the tower then holds no others, whose states are as large as its activations.
    states = tower(pixels_BCHW, output_hidden_states=list(layers), return_dict=True).hidden_states
    return [states[layer] for layer in layers]


def _join(model: Any, states: Sequence[Tensor]) -> Tensor:
    joined_BTD = states[0].contiguous() if len(states) == 1 else torch.cat(list(states), dim=-1)
    return _without_class(model, joined_BTD)


def _without_class(model: Any, states_BTD: Tensor) -> Tensor:
    has_class_token = model.config.vision_feature_select_strategy == "default"
    return states_BTD[:, 1:] if has_class_token else states_BTD


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
