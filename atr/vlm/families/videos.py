"""Videos of a mixed input: their tokens stay whole, encoded once by the model's own `get_video_features`."""

import warnings
from collections.abc import Mapping
from inspect import signature
from typing import Any

from atr.features.token_grids import merge_size
from atr.vlm.families import family_of
from atr.vlm.families.pixel_checks import read_sizes
from atr.vlm.families.rule import Rule

_SAID: set[str] = set()


def video_keys(model: Any) -> frozenset[str]:
    """The processor's outputs that describe videos; none for a family that is not proven with videos."""
    family = family_of(model)
    if not isinstance(family, Rule) or not family.entry.videos:
        return frozenset()
    timing = {"second_per_grid_ts"} & set(signature(type(model).forward).parameters)
    return frozenset(signature(model.base_model.get_video_features).parameters) - {"kwargs"} | timing


def check_videos(model: Any, inputs: Mapping[str, Any]) -> None:
    """Raise ValueError for videos whose pixels, sizes and placeholders do not fit one another.

    For families that have `video_keys`.
    """
    given, needed = int((inputs["input_ids"] == model.config.video_token_id).sum()), 0
    if "pixel_values_videos" in inputs:
        sizes = read_sizes(inputs, "video_grid_thw", "pixel_values_videos")
        needed = int(sizes.prod(-1).sum()) // merge_size(model.config) ** 2
    if given != needed:
        raise ValueError(
            f"input_ids: {given} video placeholders for {needed} tokens of videos; a placeholder typed in a "
            "text counts as well"
        )


def encode_videos(model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The tokens of all videos as `mm_encoder_outputs`; empty without videos, and a warning if there are any.

    The warning, that videos stay whole, is given once per process and model type.
    """
    if "pixel_values_videos" not in inputs:
        return {}
    encoder, model_type = model.base_model.get_video_features, model.config.model_type
    if model_type not in _SAID:
        _SAID.add(model_type)
        warnings.warn(f"model type {model_type}: images are reduced, all video tokens are kept", stacklevel=3)
    known = {key: inputs[key] for key in signature(encoder).parameters if key in inputs}
    return {"video": encoder(**known, return_dict=True)}
