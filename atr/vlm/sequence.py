"""The token sequences of a processed input: placeholders, positions, token types, and what is left of them.

Shapes: B rows, L tokens of a row, A axes of positions, P packed and K kept tokens of an image.
"""

import itertools
from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationMixin

from atr.vlm.families import family_of
from atr.vlm.families.rule import Rule

TEXT_KEYS = frozenset({"input_ids", "attention_mask"})
TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")
"""Inputs of some families with a value for each token, by which they tell images from text."""


def token_types(model: Any) -> frozenset[str]:
    """The token types that the model's forward names."""
    return frozenset(TOKEN_TYPES) & frozenset(signature(type(model).forward).parameters)


def placeholders(model: Any, inputs: Mapping[str, Any]) -> Tensor:
    """Mask (B, L) of the tokens that stand for visual tokens."""
    placeholder_BL: Tensor = inputs["input_ids"] == model.config.image_token_id
    return placeholder_BL


def image_bounds(placeholder_BL: Tensor, sizes: Sequence[int]) -> Tensor:
    """First placeholder of each image and the end, as indices into all placeholders; int64 (images + 1,)."""
    row_P = placeholder_BL.nonzero()[:, 0]
    if len(row_P) != sum(sizes):
        raise ValueError(
            f"input_ids: {len(row_P)} image placeholders for {sum(sizes)} tokens of {len(sizes)} images; "
            "a placeholder typed in a text counts as well"
        )
    bounds = torch.tensor([0, *itertools.accumulate(sizes)], device=row_P.device)
    if (row_P[bounds[:-1]] != row_P[bounds[1:] - 1]).any():
        raise ValueError("input_ids: the placeholders of one image lie in two rows")
    return bounds


def mark_kept(
    placeholder_BL: Tensor, real_BL: Tensor, images: Sequence[Tensor], keep: Sequence[Tensor]
) -> Tensor:
    """Mask (B, L) of the tokens to keep: all text, the kept tokens of each image, no padding."""
    bounds = image_bounds(placeholder_BL, list(map(len, images)))
    stay_P = torch.zeros(int(bounds[-1]), dtype=torch.bool, device=placeholder_BL.device)
    for start, keep_K in zip(bounds[:-1], keep, strict=True):
        stay_P[start + keep_K.to(stay_P.device)] = True
    return real_BL.masked_scatter(placeholder_BL, stay_P)


def left_tags(model: Any, placeholder_BL: Tensor, stay_BL: Tensor, sizes: Sequence[int]) -> Tensor:
    """Mask (B, L) of the tokens between two runs of an image that belong to a run without kept tokens."""
    family = family_of(model)
    tags_BL = torch.zeros_like(stay_BL)
    if not isinstance(family, Rule) or not family.entry.tags:
        return tags_BL
    places, stays = placeholder_BL.nonzero().tolist(), stay_BL[placeholder_BL].tolist()
    image_of = [image for image, size in enumerate(sizes) for _ in range(size)]
    ends = [0, *(after for after in range(1, len(places)) if _is_gap(*places[after - 1 : after + 1]))]
    has_kept = [any(stays[first:after]) for first, after in itertools.pairwise([*ends, len(places)])]
    for run, after in enumerate(ends[1:], start=1):
        owner = run - 1 if family.entry.tags == "before" else run
        (row, start), (_, end) = places[after - 1 : after + 1]
        if image_of[after - 1] == image_of[after] and not has_kept[owner]:
            tags_BL[row, start + 1 : end] = True
    return tags_BL


def _is_gap(place: Sequence[int], after: Sequence[int]) -> bool:
    """Whether two placeholders, (row, column) each, do not stand side by side."""
    return [place[0], place[1] + 1] != list(after)


def has_axes(model: Any) -> bool:
    """Whether the model numbers tokens by a rule of its own, as those with axes for rows and columns do."""
    own, common = (kind._prepare_position_ids_for_generation for kind in (type(model), GenerationMixin))
    return own is not common


def position_ids(model: Any, inputs: Mapping[str, Any]) -> Tensor:
    """The position ids of an input with all its tokens, as the model numbers them.

    (B, L), or (A, B, L) for models with several axes, such as the time, rows and columns of Qwen-VL.
    """
    if not has_axes(model):
        real_BL = inputs["attention_mask"].bool()
        first = family.entry.first if isinstance(family := family_of(model), Rule) else 0
        positions_BL: Tensor = (real_BL.long().cumsum(1) - 1).clamp(min=0) + first
        return positions_BL
    core = model.base_model
    deltas = getattr(core, "rope_deltas", None)
    positions_ABL: Tensor = model._prepare_position_ids_for_generation(inputs["input_ids"], dict(inputs))
    if hasattr(core, "rope_deltas"):
        core.rope_deltas = deltas  # the model's state of its last input
    return positions_ABL


def widen(
    model: Any, inputs: Mapping[str, Any], sizes: Sequence[int], new_sizes: Sequence[int]
) -> dict[str, Any]:
    """The inputs with `new_sizes` placeholders for the images, at least `sizes`; rows left-padded."""
    placeholder_BL = placeholders(model, inputs)
    starts = image_bounds(placeholder_BL, sizes)[:-1]
    more_I = torch.tensor(new_sizes) - torch.tensor(sizes)
    real_BL = inputs["attention_mask"].bool()
    copies_BL = real_BL.long()  # removes the padding; rows are padded anew below
    copies_BL[tuple(placeholder_BL.nonzero()[starts].T)] += more_I.to(copies_BL.device)
    rows = [
        ids_L.repeat_interleave(copies_L)
        for ids_L, copies_L in zip(inputs["input_ids"], copies_BL, strict=True)
    ]
    longest = max(map(len, rows))
    input_ids = [F.pad(row_L, (longest - len(row_L), 0), value=pad_id(model)) for row_L in rows]
    mask = [F.pad(torch.ones_like(row_L), (longest - len(row_L), 0)) for row_L in rows]
    return {**inputs, "input_ids": torch.stack(input_ids), "attention_mask": torch.stack(mask)}


def pack_left(values_ABL: Tensor, stay_BL: Tensor, fill: int) -> Tensor:
    """The values of `stay_BL`, each row right-aligned and left-padded with `fill` to the longest row.

    Values are (B, L), or (A, B, L) with several axes.
    """
    lengths_B1 = stay_BL.sum(dim=1, keepdim=True)
    longest = int(lengths_B1.max())
    slot_L = torch.arange(longest, device=values_ABL.device)
    packed_ABL = values_ABL.new_full((*values_ABL.shape[:-1], longest), fill)
    packed_ABL[..., slot_L >= longest - lengths_B1] = values_ABL[..., stay_BL]
    return packed_ABL


def pad_id(model: Any) -> int:
    """The padding token's id; 0 if the model has none, because the mask hides padding."""
    configs = (model.generation_config, model.config, model.config.get_text_config())
    known = (getattr(config, "pad_token_id", None) for config in configs)
    return next((number for number in known if number is not None), 0)
