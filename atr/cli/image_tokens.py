"""Tokens per image of encoders, from their hub id or their files, without loading torch."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from atr.config.presets import EncoderPreset
from atr.core.files import read_json

FEATURE_BYTES = 2
"""Bytes per channel in the feature store: bfloat16."""


@dataclass(frozen=True)
class FeatureShape:
    """Shape of one image's features: N tokens of D channels."""

    tokens: int
    width: int

    @property
    def bytes(self) -> int:
        """Size in the feature store."""
        return self.tokens * self.width * FEATURE_BYTES


@dataclass(frozen=True)
class NativeResolution:
    """Images that keep their shape: the sides become multiples of a token's, and the area is bounded."""

    side: int
    """Side of a token in pixels: that of a patch, times the patches that are merged along it."""
    least: int
    """Smallest area in pixels."""
    most: int
    """Largest area in pixels."""

    @property
    def fewest(self) -> int:
        """Tokens of an image of the smallest area."""
        return max(1, math.ceil(self.least / self.side**2))

    @property
    def largest(self) -> int:
        """Tokens of an image of the largest area."""
        return max(1, self.most // self.side**2)

    def tokens(self, width: int, height: int) -> int:
        """Tokens of an image of width x height pixels, as Qwen's image processor resizes it."""
        columns, rows = (round(side / self.side) for side in (width, height))
        area = columns * rows * self.side**2
        if area > self.most:
            shrink = math.sqrt(width * height / self.most)
            columns, rows = (max(1, math.floor(side / shrink / self.side)) for side in (width, height))
        elif area < self.least:
            enlarge = math.sqrt(self.least / (width * height))
            columns, rows = (math.ceil(side * enlarge / self.side) for side in (width, height))
        return columns * rows


FIXED = {
    "openai/clip-vit-large-patch14-336": FeatureShape(24 * 24, 1024),
    "openai/clip-vit-large-patch14": FeatureShape(16 * 16, 1024),
    "google/siglip-so400m-patch14-384": FeatureShape(27 * 27, 1152),
    "facebook/dinov2-small": FeatureShape(16 * 16, 384),
    "facebook/dinov2-base": FeatureShape(16 * 16, 768),
    "OpenGVLab/InternVL3-8B-hf": FeatureShape(256, 3584),
    "google/gemma-3-4b-it": FeatureShape(256, 2560),
    "HuggingFaceTB/SmolVLM-500M-Instruct": FeatureShape(64, 960),
}
"""Feature shapes of encoders on the hub, of an image, or a tile of one, of their processors' own size."""
TOKEN_SIDES = {
    "Qwen/Qwen2.5-VL-3B-Instruct": 28,
    "Qwen/Qwen2.5-VL-7B-Instruct": 28,
    "Qwen/Qwen3-VL-2B-Instruct": 32,
    "Qwen/Qwen3-VL-8B-Instruct": 32,
}
"""Side of a token in pixels, of encoders of native resolution on the hub."""


def resolution_of(encoder: EncoderPreset) -> NativeResolution | None:
    """How an encoder resizes images if it keeps their shape, with the bounds of the preset; else None."""
    name = encoder.path.partition("@")[0]
    if name in TOKEN_SIDES:
        own = NativeResolution(TOKEN_SIDES[name], encoder.min_pixels or 1, encoder.max_pixels or 1)
    elif found := _native_folder(Path(encoder.path)):
        own = found
    else:
        return None
    return replace(own, least=encoder.min_pixels or own.least, most=encoder.max_pixels or own.most)


def features_of(
    encoder: EncoderPreset, layer: int | str | None, image: tuple[int, int]
) -> FeatureShape | None:
    """Features of an image of (width, height) pixels, by the hub id or from the folder's files.

    None if they are unknown.
    """
    width = encoder.width_at(layer)
    if resolution := resolution_of(encoder):
        is_merged = (encoder.layer if layer is None else layer) == "merged"
        return FeatureShape(resolution.tokens(*image), width or _native_width(Path(encoder.path), is_merged))
    name = encoder.path.partition("@")[0]  # a revision does not change the shape
    shape = FIXED.get(name) or _fixed_folder(Path(encoder.path))
    return replace(shape, width=width) if shape and width else shape


def _fixed_folder(folder: Path) -> FeatureShape | None:
    """The feature shape of an encoder's folder; None for a folder of another kind of model."""
    try:
        tree = read_json(folder / "config.json")
        vision = tree.get("vision_config", tree)
        height, width = _processed_size(folder) or _pair(vision["image_size"])
        down, right = _pair(vision["patch_size"])
        return FeatureShape((height // down) * (width // right), vision["hidden_size"])
    except (OSError, KeyError, TypeError, ValueError):  # no such file or key: another kind of model
        return None


def _native_folder(folder: Path) -> NativeResolution | None:
    """The resolution of a folder of a model that merges patches, with its image processor's own bounds."""
    try:
        vision = read_json(folder / "config.json")["vision_config"]
        processor = _image_processor(folder) or {}
        size = processor.get("size") or {}
        least, most = (
            processor.get(key) or size[edge]
            for key, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge"))
        )
        return NativeResolution(vision["patch_size"] * vision["spatial_merge_size"], least, most)
    except (OSError, KeyError, TypeError, ValueError):
        return None


def _native_width(folder: Path, is_merged: bool) -> int:
    """Channels of the merged tokens, or of the patch states, of such a folder."""
    tree = read_json(folder / "config.json")
    vision = tree["vision_config"]
    width = tree.get("text_config", tree)["hidden_size"] if is_merged else None
    # Qwen2-VL's tower gives the width of the language model the name that others give their own.
    return int(width or vision.get("embed_dim", vision["hidden_size"]))


def _processed_size(folder: Path) -> tuple[int, int] | None:
    """(height, width) of the images that the folder's image processor returns; None if it does not say."""
    processor = _image_processor(folder)
    if processor is None:
        return None
    crop = processor.get("do_center_crop") and processor.get("crop_size")
    size = crop or processor.get("size")
    return _pair(size) if isinstance(size, int) or "height" in (size or {}) else None


def _image_processor(folder: Path) -> dict[str, Any] | None:
    """The settings of a folder's image processor; None if there are none."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).is_file():
            tree: dict[str, Any] = read_json(folder / name)
            settings: dict[str, Any] = tree.get("image_processor", tree)
            return settings
    return None


def _pair(sides: Any) -> tuple[int, int]:
    if isinstance(sides, dict):
        return sides["height"], sides["width"]
    return (sides, sides) if isinstance(sides, int) else (sides[0], sides[1])
