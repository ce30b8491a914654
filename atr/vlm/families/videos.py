"""Videos of a mixed input: their tokens stay whole, encoded once by the model's own `get_video_features`."""

import warnings
from collections.abc import Mapping
from inspect import signature
from typing import Any

from atr.vlm.families import family_of
from atr.vlm.families.rule import Rule

_SAID: set[str] = set()


def video_keys(model: Any) -> frozenset[str]:
    """The processor's outputs that describe videos; none for a family that is not proven with videos."""
    family = family_of(model)
    if not isinstance(family, Rule) or not family.entry.videos:
        return frozenset()
    timing = {"second_per_grid_ts"} & set(signature(type(model).forward).parameters)
    return frozenset(signature(model.base_model.get_video_features).parameters) - {"kwargs"} | timing


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
