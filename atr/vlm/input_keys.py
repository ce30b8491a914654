"""Checks the keys and tensors of a processed input against its model, before the tower runs.

Shapes: B rows, L tokens of a row.
"""

from collections.abc import Collection, Mapping
from inspect import signature
from typing import Any

from torch import Tensor

from atr.vlm.families import family_of
from atr.vlm.families.rule import Rule
from atr.vlm.families.videos import check_videos, video_keys
from atr.vlm.sequence import TEXT_KEYS, TOKEN_TYPES, placeholders, token_types


def check_keys(model: Any, inputs: Mapping[str, Any]) -> None:
    """Raise ValueError for inputs that are no text or images, are missing, or do not fit one another."""
    if not isinstance(inputs, Mapping):
        kind = type(inputs).__name__
        raise ValueError(f"inputs: it is a {kind}, allowed: the mapping that the model's processor returns")
    types = token_types(model)
    videos = video_keys(model)
    known = TEXT_KEYS | family_of(model).image_keys(model) | videos | types
    if unknown := sorted(set(inputs) - known):
        raise ValueError(f"inputs: {unknown[0]} cannot be shortened, allowed: {', '.join(sorted(known))}")
    if missing := sorted(TEXT_KEYS - set(inputs)):
        raise ValueError(f"inputs: {missing[0]} is missing, needed: {', '.join(sorted(TEXT_KEYS))}")
    _check_tensors(inputs)
    if set(inputs) & {"pixel_values", "pixel_values_videos"} and (missing := sorted(types - set(inputs))):
        raise ValueError(
            f"inputs: {missing[0]} is missing, without which {model.config.model_type} misreads images"
        )
    if "pixel_values" in inputs and (missing := sorted(_image_needs(model) - set(inputs))):
        raise ValueError(f"inputs: {missing[0]} is missing, needed with pixel_values")
    shape = tuple(inputs["input_ids"].shape)
    for key in sorted((types | {"attention_mask"}) & set(inputs)):
        if (given := tuple(inputs[key].shape)) != shape:
            raise ValueError(f"inputs: {key} is {given}, input_ids is {shape}, allowed: the same shape")
    if not (real_B := inputs["attention_mask"].bool().any(1)).all():
        raise ValueError(f"inputs: attention_mask hides all of row {int((~real_B).nonzero()[0, 0])}")
    _check_marks(model, inputs, types)
    if videos:
        check_videos(model, inputs)


def _check_marks(model: Any, inputs: Mapping[str, Any], types: Collection[str]) -> None:
    """Raise ValueError for token types that have images as text, such as those of a tokenizer alone."""
    family, placeholder_BL = family_of(model), placeholders(model, inputs)
    if not isinstance(family, Rule) or not family.entry.marked:
        return
    for key in sorted(set(types) & set(inputs)):
        if (inputs[key][placeholder_BL] == 0).any():
            raise ValueError(
                f"inputs: {key} is 0 (text) at an image placeholder of input_ids, allowed: the types that "
                "the model's processor gives"
            )


def _check_tensors(inputs: Mapping[str, Any]) -> None:
    """Raise ValueError for text or pixels that are no tensors of rows, as without return_tensors="pt"."""
    for key in sorted((TEXT_KEYS | set(TOKEN_TYPES) | {"pixel_values"}) & set(inputs)):
        if not isinstance(inputs[key], Tensor):
            kind = type(inputs[key]).__name__
            raise ValueError(f'inputs: {key} is a {kind}, allowed: a tensor, as of return_tensors="pt"')
    if inputs["input_ids"].is_floating_point():
        raise ValueError(f"inputs: input_ids is {inputs['input_ids'].dtype}, allowed: integers")
    if inputs["input_ids"].ndim != 2:
        shape = tuple(inputs["input_ids"].shape)
        raise ValueError(f"inputs: input_ids is {shape}, allowed: (rows, tokens)")
    if "pixel_values" in inputs and not inputs["pixel_values"].numel():
        shape = tuple(inputs["pixel_values"].shape)
        raise ValueError(f"inputs: pixel_values is {shape}, allowed: images, or none for a text alone")


def _image_needs(model: Any) -> frozenset[str]:
    """The image arguments without which the model's `get_image_features` raises an error of its own."""
    encode = getattr(model.base_model, "get_image_features", None)
    parameters = signature(encode).parameters.values() if encode else ()
    required = {each.name for each in parameters if each.default is each.empty and each.name != "kwargs"}
    return family_of(model).image_keys(model) & required
