"""What differs between families of models: how images become the tokens that a language model is fed.

A host says into which tiles the images were cut, and packs what belongs to the tokens of all tiles (features,
scores, marks) into one sequence per image, by the code of the model itself. Everything else about shortening
an input is the same for all families. Shapes: B tiles of all images in order, N tokens of each in raster
order, C channels of what is packed, P packed tokens of an image.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import (
    get_anyres_image_grid_shape,
    image_size_to_num_patches,
)

from atr.features.attention_hooks import CAPTURABLE, CLASS_TOKENS, capture_attention, leading_tokens
from atr.reduction.base import EncoderOutput

# More tiles than any image has: OneVision's packing then never finds too many tokens to keep them all.
_NEVER_RESAMPLED = "anyres_max_1000000"


@dataclass(frozen=True)
class Tiling:
    """Into how many tiles each image was cut, each of (rows, columns) tokens; tile 0 shows it whole.

    `sizes` are the (height, width) of the images in pixels before that, where a host unpads by them, and
    `arrangements` the rows and columns of each image's tiles after tile 0, (0, 0) where it was not cut.
    """

    tiles: tuple[int, ...]
    grid: tuple[int, int]
    sizes: Any = None
    arrangements: tuple[tuple[int, int], ...] = ()


class Family(Protocol):
    """One family; `image_keys` are the processor's outputs that describe images and end with the encoding."""

    image_keys: frozenset[str]

    def tiling(self, model: Any, inputs: Mapping[str, Tensor]) -> Tiling:
        """How the images were cut; raises ValueError where pixels and model disagree."""

    def pack(
        self, model: Any, tiling: Tiling, values_BNC: Tensor, newline_C: Tensor | None, resample: bool
    ) -> list[Tensor]:
        """Values of each image in the order of the packed features, (P, C) each.

        Row ends, where the family has any, hold `newline_C`, by default the model's own newline embedding.
        `resample=False` leaves out the shrinking of large images, where the family shrinks them.
        """


class Llava:
    """LLaVA 1.5: one tile an image, packed as it comes."""

    image_keys = frozenset({"pixel_values"})

    def tiling(self, model: Any, inputs: Mapping[str, Tensor]) -> Tiling:
        """One tile an image, of whatever size."""
        pixels_BCHW = inputs["pixel_values"]
        return Tiling((1,) * len(pixels_BCHW), _grid(model, pixels_BCHW))

    def pack(
        self, model: Any, tiling: Tiling, values_BNC: Tensor, newline_C: Tensor | None, resample: bool
    ) -> list[Tensor]:
        """The values, image by image."""
        return list(values_BNC)


class LlavaNext:
    """LLaVA-NeXT: the whole image, then the rows of its tiles joined and unpadded, each with a newline."""

    image_keys = frozenset({"pixel_values", "image_sizes"})

    def tiling(self, model: Any, inputs: Mapping[str, Tensor]) -> Tiling:
        """Tiles of the resolution that fits each image best."""
        return _cut(model, inputs, [True] * len(_sizes(inputs)))

    def pack(
        self, model: Any, tiling: Tiling, values_BNC: Tensor, newline_C: Tensor | None, resample: bool
    ) -> list[Tensor]:
        """By the model's `pack_image_features`."""
        packed, _ = model.model.pack_image_features(
            torch.split(values_BNC, list(tiling.tiles)),
            tiling.sizes,
            vision_feature_select_strategy=model.config.vision_feature_select_strategy,
            image_newline=model.model.image_newline if newline_C is None else newline_C,
        )
        return list(packed)


class LlavaOnevision:
    """LLaVA-OneVision: as NeXT, large grids shrunk; of several images in a sample one tile each."""

    image_keys = frozenset({"pixel_values", "image_sizes", "batch_num_images"})

    def tiling(self, model: Any, inputs: Mapping[str, Tensor]) -> Tiling:
        """Tiles of the resolution that fits an image best, where it is the only one of its sample."""
        images = torch.as_tensor(inputs.get("batch_num_images", [1] * len(_sizes(inputs)))).tolist()
        return _cut(model, inputs, list(chain.from_iterable([count == 1] * count for count in images)))

    def pack(
        self, model: Any, tiling: Tiling, values_BNC: Tensor, newline_C: Tensor | None, resample: bool
    ) -> list[Tensor]:
        """By the model's `pack_image_features`, told of a limit out of reach where nothing is to shrink."""
        packed, _ = model.model.pack_image_features(
            torch.split(values_BNC, list(tiling.tiles)),
            tiling.sizes,
            image_newline=model.model.image_newline if newline_C is None else newline_C,
            vision_aspect_ratio=model.config.vision_aspect_ratio if resample else _NEVER_RESAMPLED,
        )
        return list(packed)


FAMILIES: dict[str, Family] = {
    "llava": Llava(),
    "llava_next": LlavaNext(),
    "llava_onevision": LlavaOnevision(),
}
"""Family of each family, by `model.config.model_type`."""


def family_of(model: Any) -> Family:
    """The host of a model's family; raises ValueError for a family that has none."""
    family = model.config.model_type
    if family not in FAMILIES:
        raise ValueError(f"model type {family!r} is not supported, allowed: {', '.join(FAMILIES)}")
    return FAMILIES[family]


def encode(
    model: Any, inputs: Mapping[str, Tensor], tiling: Tiling, needs: Collection[str] = frozenset()
) -> EncoderOutput:
    """Features of every tile at the layer the model reads, before and after its projector.

    Beside them what a reducer `needs` of the tower: attention and keys, of the last layer where the model
    reads several, pixels, and the tower itself. Raises ValueError where the tokens do not lie on the grid, as
    class or register tokens do not, and for attention or keys of a tower whose tokens are not known.
    """
    tower, pixels = model.model.vision_tower, inputs["pixel_values"]
    if pixels.ndim == 5:  # filled up with blank tiles to the most tiles of any image
        pixels = torch.cat([image[:count] for image, count in zip(pixels, tiling.tiles, strict=True)])
    pixels_BCHW = pixels.to(tower.device, tower.dtype)
    observed = set(needs) & set(CAPTURABLE)
    with capture_attention(tower, _layers(model)[-1], *_leading_tokens(tower, observed), observed) as seen:
        features_BND = _features(model, pixels_BCHW)
    known: dict[str, Any] = {"pixels_BCHW": pixels_BCHW, "encode": partial(_features, model)}
    known = {name: value for name, value in (known | seen).items() if name in needs}
    projected_BND = project(model, features_BND)
    return EncoderOutput(features_BND, tiling.grid, projected_BND=projected_BND, image_key_BX=pixels, **known)


def project(model: Any, features_BND: Tensor) -> Tensor:
    """What the language model is fed of an encoder's features, by the model's projector.

    The features take the projector's type: a tower may have another one, and gives the model its `dtype`.
    """
    projector = model.model.multi_modal_projector
    floating = (weight.dtype for weight in projector.parameters() if weight.is_floating_point())
    projected_BND: Tensor = projector(features_BND.to(next(floating, model.dtype)))
    return projected_BND


def _features(model: Any, pixels_BCHW: Tensor) -> Tensor:
    tower = model.model.vision_tower
    states = tower(pixels_BCHW, output_hidden_states=True, return_dict=True).hidden_states
    features_BND = torch.cat([states[layer] for layer in _layers(model)], dim=-1)
    is_led = model.config.vision_feature_select_strategy == "default"
    return features_BND[:, 1:] if is_led else features_BND  # without the class token


def _layers(model: Any) -> Sequence[int]:
    layer = model.config.vision_feature_layer
    return [layer] if isinstance(layer, int) else layer


def _leading_tokens(tower: Any, observed: Collection[str]) -> tuple[int, int]:
    """As `leading_tokens`, which matters only where something is observed."""
    if not observed:
        return 0, 0
    kind = tower.config.model_type
    if kind not in CLASS_TOKENS:
        allowed = ", ".join(CLASS_TOKENS)
        raise ValueError(f"{sorted(observed)[0]} cannot be had of a tower of type {kind}, allowed: {allowed}")
    return leading_tokens(tower.config)


def _grid(model: Any, pixels: Tensor) -> tuple[int, int]:
    rows, columns = (size // model.config.vision_config.patch_size for size in pixels.shape[-2:])
    return rows, columns


def _sizes(inputs: Mapping[str, Tensor]) -> Any:
    if "image_sizes" not in inputs:
        raise ValueError("inputs: image_sizes is missing, needed beside pixel_values")
    return inputs["image_sizes"]


def _cut(model: Any, inputs: Mapping[str, Tensor], is_cut: Sequence[bool]) -> Tiling:
    """The tiling by the model's own count of tiles, compared with the pixels there are."""
    side, pinpoints = model.config.vision_config.image_size, model.config.image_grid_pinpoints
    pixels, sizes = inputs["pixel_values"], torch.as_tensor(_sizes(inputs)).tolist()
    if len(sizes) != len(is_cut):
        raise ValueError(f"batch_num_images: {len(is_cut)} images, image_sizes has {len(sizes)}")
    if tuple(pixels.shape[-2:]) != (side, side):
        raise ValueError(f"pixel_values: tiles of {tuple(pixels.shape[-2:])} pixels, the model reads {side}")
    wanted = [
        image_size_to_num_patches(size, pinpoints, side) if cut else 1
        for size, cut in zip(sizes, is_cut, strict=True)
    ]
    found = [pixels.shape[1]] * len(pixels) if pixels.ndim == 5 else [len(pixels)]
    total = wanted if pixels.ndim == 5 else [sum(wanted)]
    if len(found) != len(total) or any(have < want for have, want in zip(found, total, strict=True)):
        raise ValueError(f"pixel_values: {found} tiles, image_sizes and image_grid_pinpoints want {total}")
    arrangements = tuple(
        get_anyres_image_grid_shape(size, pinpoints, side) if cut else (0, 0)
        for size, cut in zip(sizes, is_cut, strict=True)
    )
    return Tiling(tuple(wanted), _grid(model, pixels), sizes, arrangements)
