"""The rule that shortens any model of transformers with `mm_encoder_outputs`, by asking the model itself.

Images are encoded by the model's own `get_image_features`, whose `pooler_output` are the tokens that the
language model is fed, in the order of the placeholders. Where a model type leaves the rule, a line of
`atr.vlm.families.table` says so. Shapes: N tokens of a tile, P of an image, D width.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from atr.features.attention_hooks import CAPTURABLE
from atr.features.merged import encode_images
from atr.features.query_key_attention import capture_merged_attention
from atr.features.token_grids import image_arguments, real_tiles
from atr.vlm.encoded_tiles import EncodedTiles
from atr.vlm.families.base import Layer, Tiling
from atr.vlm.families.grids import find_runs
from atr.vlm.families.table import Entry
from atr.vlm.image_tokens import ImageTokens

_GIVEN = frozenset({"grid", "projected_BND", "text_BD"})
"""Fields of EncoderOutput that every family of the rule gives."""


@dataclass(frozen=True)
class Rule:
    """A family of which the model itself is asked; `entry` says where it leaves the rule."""

    entry: Entry

    def image_keys(self, model: Any) -> frozenset[str]:
        """The arguments of `get_image_features`."""
        return image_arguments(model)

    def tiling(self, model: Any, inputs: Mapping[str, Tensor]) -> Tiling:
        """The grids by the table's rule, and the tiles of each image by the runs of placeholders."""
        ids_BL = inputs["input_ids"]
        runs = find_runs(ids_BL, ids_BL == model.config.image_token_id)
        grids = self.entry.grids(model, inputs, runs)
        return Tiling(tuple(self.entry.images(runs, grids)), tuple(grids))

    def encode(
        self,
        model: Any,
        inputs: Mapping[str, Tensor],
        tiling: Tiling,
        needs: Collection[str] = frozenset(),
        layer: Layer = None,
    ) -> EncodedTiles:
        """Merged tokens, or the patch states of a numbered layer averaged over each token's patches.

        Attention and keys are averaged likewise, and those of merged tokens are of the layer that is merged.
        """
        _check_needs(model, tiling, needs)
        signals = set(needs) & set(CAPTURABLE)
        with capture_merged_attention(model, layer, tiling.grids, signals) as observed:
            output, states = encode_images(model, inputs, layer if isinstance(layer, int) else None)
        counts = [rows * columns for rows, columns in tiling.grids]
        merged = _split(output.pooler_output, counts)
        fields = {"features_BND": merged if states is None else states, "projected_BND": merged, **observed}
        if keys := _image_keys(inputs, len(counts)):
            fields["image_key_BX"] = keys
        return EncodedTiles.of_grids(tiling.grids, fields, output)

    def pack(
        self, model: Any, tiling: Tiling, values: Sequence[Tensor], newline_C: Tensor | None, resample: bool
    ) -> list[Tensor]:
        """The values of an image's tiles one after another."""
        return [_join(values[first:after]) for first, after in pairwise(tiling.firsts)]

    def tokens(self, model: Any, tiling: Tiling, encoded: EncodedTiles, resample: bool) -> ImageTokens:
        """The merged tokens, with the further features and fields that the table names."""
        output, sizes = encoded.output, _image_sizes(tiling)
        levels = getattr(output, self.entry.levels, None) or () if self.entry.levels else ()
        return ImageTokens(
            _split(output.pooler_output, sizes),
            [_split(level, sizes) for level in levels],
            {name: getattr(output, name) for name in self.entry.carried},
        )

    def project(self, model: Any, features_BND: Tensor) -> Tensor:
        """The features themselves: merged tokens are what the language model is fed."""
        return features_BND


def _check_needs(model: Any, tiling: Tiling, needs: Collection[str]) -> None:
    if unknown := sorted(set(needs) - _GIVEN - set(CAPTURABLE)):
        raise ValueError(f"{unknown[0]} is not available from {model.config.model_type}")
    if "first_attention_BN" in needs and max(tiling.tiles) > 1:
        raise ValueError(
            f"first_attention_BN splits a budget by a first tile that shows the whole image, "
            f"{model.config.model_type} gives it for images of one tile only"
        )


def why_not_served(model: Any) -> str:
    """What the rule misses in a model; empty if it can be asked all that the rule needs."""
    if "mm_encoder_outputs" not in signature(type(model).forward).parameters:
        return "its forward does not name mm_encoder_outputs, and would ignore it without a word"
    if not hasattr(model.base_model, "get_image_features"):
        return "it has no get_image_features"
    if getattr(model.config, "image_token_id", None) is None:
        return "its config has no image_token_id"
    return ""


def _image_keys(inputs: Mapping[str, Tensor], tiles: int) -> list[Tensor]:
    """The pixels of each tile without the padding of its batch; none if they cannot be told apart."""
    pixels = inputs["pixel_values"]
    if "image_grid_thw" in inputs:  # (patches of all images, values)
        return list(torch.split(pixels, torch.as_tensor(inputs["image_grid_thw"]).prod(-1).tolist()))
    if pixels.ndim == 5:  # (rows, tiles, ...)
        pixels = real_tiles(pixels)
    if len(pixels) != tiles:
        return []
    if "image_sizes" not in inputs:
        return list(pixels)
    sizes = torch.as_tensor(inputs["image_sizes"]).tolist()
    return [pixels_CHW[:, :height, :width] for pixels_CHW, (height, width) in zip(pixels, sizes, strict=True)]


def _split(images: Tensor | Sequence[Tensor], sizes: list[int]) -> list[Tensor]:
    """Tokens in the order of the placeholders in parts of these sizes; without a copy for one tensor."""
    if isinstance(images, Tensor):
        flat_PD = images.reshape(-1, images.shape[-1])
    else:
        flat_PD = _join([tokens.reshape(-1, tokens.shape[-1]) for tokens in images])
    return list(torch.split(flat_PD, sizes))


def _join(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _image_sizes(tiling: Tiling) -> list[int]:
    counts = [rows * columns for rows, columns in tiling.grids]
    return [sum(counts[first:after]) for first, after in pairwise(tiling.firsts)]
