"""Features of images with grids of their own, or of several patches a feature: what an Encoder runs then.

Shapes: see atr.core.tokens; N tokens of an image in raster order, P patches of all images.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from atr.core.ragged import Grid
from atr.core.tower_layer import TowerLayer
from atr.features.merged import (
    image_features,
    patch_side,
    pooled_states,
    token_grids,
    vision_tower,
)

PATCHES_PER_PASS = 8192
"""Images are encoded together up to so many patches: attention masks of some towers are their square."""

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
