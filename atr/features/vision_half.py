"""Features of images with grids of their own, or of several patches a feature: what an Encoder runs then.

Shapes: see atr.core.tokens; N tokens of an image in raster order, P patches of all images.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from atr.core.ragged import Grid
from atr.core.tower_layer import MERGED, TowerLayer
from atr.features.merged import PATCHES, image_features, pooled_states, token_grids, vision_tower
from atr.features.query_key_attention import capture_merged_attention
from atr.features.token_grids import patch_side

PATCHES_PER_PASS = 8192
"""Images are encoded together up to so many patches: attention masks of some towers are their square."""

TOKEN_ENCODERS = (
    "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "gemma3", "gemma4",
    "paligemma", "internvl", "smolvlm", "idefics3", "mistral3",
)  # fmt: skip
"""Types of vision-language models whose tokens, or means of their patches, an Encoder gives."""

# Settings of image processors with which a host's encoder sees each image whole, not cut into tiles.
_WHOLE_IMAGES: dict[str, dict[str, Any]] = {
    "gemma3": {"do_pan_and_scan": False},
    "internvl": {"crop_to_patches": False},
    "smolvlm": {"do_image_splitting": False},
    "idefics3": {"do_image_splitting": False},
}

_NESTED = ("smolvlm", "idefics3")  # pixels of rows of images, here of one each
_LANGUAGE = ("language_model", "text_model", "audio_tower", "embed_audio")


def without_language_model(cls: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """A vision-language model class that is built and loaded as its vision tower and merger alone."""

    def build(self: PreTrainedModel, config: PretrainedConfig) -> None:
        cls.__init__(self, config)  # on the meta device while weights are loaded: nothing is allocated
        for name in _LANGUAGE:
            if getattr(self, name, None) is not None:
                delattr(self, name)

    # Same name and module: transformers finds by them how to rename the weights of older checkpoints.
    return type(cls.__name__, (cls,), {"__init__": build, "__module__": cls.__module__})


def makes_tokens(config: Any, layer: TowerLayer) -> bool:
    """Whether features are tokens of a vision-language model, which the tower alone cannot give."""
    kind = config.model_type
    return kind in TOKEN_ENCODERS and (layer == MERGED or PATCHES[kind].block(config) > 1)


def processor_settings(config: Any) -> dict[str, Any]:
    """Settings of the image processor other than in its own file: images whole, and in whole tokens."""
    if config.model_type == "mistral3":  # as its processor tells its image processor in each call
        side = config.vision_config.patch_size * config.spatial_merge_size
        return {"patch_size": {"height": side, "width": side}}
    return _WHOLE_IMAGES.get(config.model_type, {})


def check_patches(path: str, processor: Any, vision: Any) -> None:
    """Refuse an image processor that cuts patches in which the tower could not read them."""
    fields = {
        "patch_size": "patch_size",
        "temporal_patch_size": "temporal_patch_size",
        "merge_size": "spatial_merge_size",
        "pooling_kernel_size": "pooling_kernel_size",
    }
    for field, needed in fields.items():
        value, allowed = getattr(processor, field, None), getattr(vision, needed, None)
        if isinstance(value, int) and allowed is not None and value != allowed:
            raise ValueError(f"{path}: its image processor has {field} {value}, allowed: {allowed}")


def whole_grid(path: str, size: tuple[int, int], config: Any) -> Grid:
    """Tokens of an image that the model sees whole, in `size` (height, width) of its image processor.

    Raises ValueError unless that is the tower's.
    """
    vision, patches = config.vision_config, PATCHES[config.model_type]
    own = vision.image_size
    allowed = (own, own) if isinstance(own, int) else tuple(own)
    if size != allowed:
        raise ValueError(
            f"{path}: its image processor gives {size[0]} x {size[1]} pixels, allowed: {allowed[0]} x "
            f"{allowed[1]}"
        )
    side = patch_side(vision) * patches.block(config)
    return size[0] // side, size[1] // side


class VisionHalf(nn.Module):
    """Tower and merger of a vision-language model: merged tokens, or patches of a layer averaged by token."""

    def __init__(self, model: PreTrainedModel, layer: TowerLayer) -> None:
        super().__init__()
        self.model = model
        self.layer = layer

    @property
    def side(self) -> int:
        """Side of a patch in pixels."""
        return patch_side(self.model.config.vision_config)

    @property
    def tower(self) -> PreTrainedModel:
        """The vision tower."""
        tower: PreTrainedModel = vision_tower(self.model)
        return tower

    def forward(self, inputs: Mapping[str, Tensor]) -> list[tuple[Tensor, Grid]]:
        """features_ND and grid of each image."""
        if self.model.config.model_type in _NESTED:
            inputs = {name: values.unsqueeze(1) for name, values in inputs.items()}
        grids = token_grids(self.model, inputs)
        if isinstance(self.layer, int):
            return list(zip(pooled_states(self.model, inputs, self.layer, grids), grids, strict=True))
        return list(zip(image_features(self.model, inputs).pooler_output, grids, strict=True))

    def observe(self, pixel_values_BCHW: Tensor, grid: Grid, needs: Collection[str]) -> dict[str, Tensor]:
        """features_BND of images that all have this grid, and the signals in `needs`, in one forward."""
        grids = [grid] * len(pixel_values_BCHW)
        with capture_merged_attention(self.model, self.layer, grids, needs) as signals:
            features = [features_ND for features_ND, _ in self({"pixel_values": pixel_values_BCHW})]
        stacked = {need: torch.stack(values) for need, values in signals.items()}
        return {"features_BND": torch.stack(features), **stacked}


class NaflexTower(nn.Module):
    """The tower of SigLIP 2 NaFlex, which pads images of any grid to one number of patches."""

    def __init__(self, tower: PreTrainedModel) -> None:
        super().__init__()
        self.tower = tower

    @property
    def side(self) -> int:
        """Side of a patch in pixels."""
        return patch_side(self.tower.config)

    def forward(self, inputs: Mapping[str, Tensor]) -> list[tuple[Tensor, Grid]]:
        """features_ND after the last layer, and grid, of each image."""
        states_BPD = self.tower(**inputs, output_hidden_states=True).hidden_states[-1]
        grids = [(rows, columns) for rows, columns in inputs["spatial_shapes"].tolist()]
        return [
            (state_PD[: rows * columns], (rows, columns))
            for state_PD, (rows, columns) in zip(states_BPD, grids, strict=True)
        ]


def in_passes(inputs: Mapping[str, Tensor], side: int, limit: int) -> Iterator[dict[str, Tensor]]:
    """Inputs of consecutive images, together of at most `limit` patches of `side` pixels, or of one image."""
    patches = _patches_of_each(inputs, side)
    first = 0
    while first < len(patches):
        last = first + 1
        while last < len(patches) and sum(patches[first : last + 1]) <= limit:
            last += 1
        yield {name: values[_span(name, inputs, first, last)] for name, values in inputs.items()}
        first = last


def _patches_of_each(inputs: Mapping[str, Tensor], side: int) -> list[int]:
    """Number of patches of each image, padding included where images are padded to one size."""
    if "image_grid_thw" in inputs:
        counts: list[int] = inputs["image_grid_thw"].prod(1).tolist()
        return counts
    pixels = inputs["pixel_values"]
    patches = pixels.shape[1] if pixels.ndim == 3 else pixels.shape[-2] * pixels.shape[-1] // side**2
    return [patches] * len(pixels)


def _span(name: str, inputs: Mapping[str, Tensor], first: int, last: int) -> slice:
    """Entries of the images first to last - 1; patches of images that are not padded follow one another."""
    if name != "pixel_values" or "image_grid_thw" not in inputs:
        return slice(first, last)
    ends = torch.cumsum(inputs["image_grid_thw"].prod(1), 0).tolist()
    return slice(ends[first - 1] if first else 0, ends[last - 1])
