"""Shorten the processed input of a vision-language model: visual tokens out, the model object untouched.

The images are encoded outside the model, their dropped tokens leave `input_ids` and `attention_mask`, and the
kept features travel beside them as `mm_encoder_outputs`, which both `forward` and `generate` take (in
transformers >= 5.18).
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from atr.reduction import Encoded, FeatureSelector, Reducer, SelectorReducer
from atr.tokens import budget
from atr.vlm.hosts import host_of

POSITIONS = ("contiguous", "original")
TEXT_KEYS = frozenset({"input_ids", "attention_mask"})


def reduce(
    model: Any,
    inputs: Mapping[str, Any],
    reducer: Reducer | FeatureSelector,
    keep: float,
    positions: str = "contiguous",
) -> dict[str, Any]:
    """Shorten a processor's output to `keep` (a fraction, or an int count) of the tokens of each image.

    The result serves one call of `model(**...)` or `model.generate(**...)`. Rows may be padded on either
    side, hold several images or none; they come back left-padded to the longest. `positions` are either

    - "contiguous": the model numbers the shorter sequence itself, as it would any prompt; or
    - "original": every token keeps the position it had, and what is generated goes on from there. Without
      mask and cache transformers would take the gaps for borders between packed sequences, so the result asks
      for the cache; a call that says `use_cache=False` beside it raises TypeError.

    Raises ValueError for a family of models without host, an input this cannot shorten, placeholders that do
    not match the images, `keep` out of range, and original positions under FlashAttention, which looks for
    packed sequences in spite of a cache.
    """
    host = host_of(model)
    if "pixel_values" not in inputs:
        return shorten(model, inputs, [], [], positions)
    encoded = host.encode(model, inputs)
    keep_BK = choose(reducer, encoded, keep)
    return shorten(model, inputs, host.pack(model, encoded.features_BND), host.place(keep_BK), positions)


def choose(reducer: Reducer | FeatureSelector, encoded: Encoded, keep: float) -> Tensor:
    """Indices kept of each image in raster order, exactly `atr.tokens.budget(keep, N)`; int64 (B, K).

    Raises ValueError for `keep` out of range and for a reducer that needs what was not encoded.
    """
    if isinstance(reducer, FeatureSelector):
        reducer = SelectorReducer(reducer)
    if absent := sorted(field for field in reducer.needs if getattr(encoded, field) is None):
        raise ValueError(f"reducer {type(reducer).__name__} needs {absent[0]}, which was not encoded")
    kept = budget(keep, encoded.tokens)
    keep_BK = reducer(encoded, kept)
    asked = (len(encoded.features_BND), kept)
    assert keep_BK.shape == asked, f"{reducer} kept {tuple(keep_BK.shape)}, asked for {asked}"
    assert (keep_BK.diff(dim=1) > 0).all(), f"{reducer} kept a token twice, or out of raster order"
    return keep_BK


def shorten(
    model: Any,
    inputs: Mapping[str, Any],
    image_features: Sequence[Tensor],
    keep: Sequence[Tensor],
    positions: str = "contiguous",
) -> dict[str, Any]:
    """Keep the tokens `keep` (K,) of the `image_features` (N, D) of each image, in order of the placeholders.

    For images that were encoded and projected before. Budgets may differ between images. Result and errors as
    in `reduce`.
    """
    _check(model, inputs, positions)
    input_ids_BL = inputs["input_ids"]
    real_BL = inputs["attention_mask"].bool()
    stay_BL = _stay(input_ids_BL == model.config.image_token_id, real_BL, image_features, keep)
    shorter: dict[str, Any] = {
        "input_ids": _pack_left(input_ids_BL, stay_BL, fill=_pad_id(model)),
        "attention_mask": _pack_left(inputs["attention_mask"], stay_BL, fill=0),
    }
    # Where nothing was dropped, the model's own numbering is the original one.
    if positions == "original" and not torch.equal(stay_BL, real_BL):
        position_ids_BL = (real_BL.long().cumsum(1) - 1).clamp(min=0)
        shorter |= {"position_ids": _pack_left(position_ids_BL, stay_BL, fill=0), "use_cache": True}
    if image_features:
        kept = [features_ND[keep_K] for features_ND, keep_K in zip(image_features, keep, strict=True)]
        shorter["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=kept)}
    return shorter


def _check(model: Any, inputs: Mapping[str, Any], positions: str) -> None:
    if positions not in POSITIONS:
        raise ValueError(f"positions: {positions!r} is unknown, allowed: {', '.join(POSITIONS)}")
    attention = str(model.config.get_text_config()._attn_implementation)
    if positions == "original" and "flash" in attention:
        raise ValueError(f"positions: original is not safe under {attention}, allowed: contiguous")
    known = TEXT_KEYS | host_of(model).image_keys
    if unknown := sorted(set(inputs) - known):
        raise ValueError(f"inputs: {unknown[0]} cannot be shortened, allowed: {', '.join(sorted(known))}")
    if missing := sorted(TEXT_KEYS - set(inputs)):
        raise ValueError(f"inputs: {missing[0]} is missing, needed: {', '.join(sorted(TEXT_KEYS))}")


def _stay(
    placeholder_BL: Tensor, real_BL: Tensor, image_features: Sequence[Tensor], keep: Sequence[Tensor]
) -> Tensor:
    """Which tokens of the full sequences stay: the text, of each image the kept ones, none of the padding."""
    sizes = [len(features_ND) for features_ND in image_features]
    row_P = placeholder_BL.nonzero()[:, 0]
    if len(row_P) != sum(sizes):
        raise ValueError(f"input_ids: {len(row_P)} image placeholders for {sum(sizes)} tokens of images")
    stay_P = torch.zeros_like(row_P, dtype=torch.bool)
    # Placeholders are counted row by row, and so image by image.
    bounds = itertools.pairwise(itertools.accumulate(sizes, initial=0))
    for (start, end), keep_K in zip(bounds, keep, strict=True):
        if row_P[start] != row_P[end - 1]:
            raise ValueError("input_ids: the placeholders of one image lie in two rows")
        stay_P[start + keep_K.to(stay_P.device)] = True
    return real_BL.masked_scatter(placeholder_BL, stay_P)


def _pack_left(values_BL: Tensor, stay_BL: Tensor, fill: int) -> Tensor:
    """The values that stay, each row moved to the right end and filled up on its left to the longest row."""
    lengths_B1 = stay_BL.sum(dim=1, keepdim=True)
    longest = int(lengths_B1.max())
    slot_L = torch.arange(longest, device=values_BL.device)
    packed_BL = values_BL.new_full((len(values_BL), longest), fill)
    packed_BL[slot_L >= longest - lengths_B1] = values_BL[stay_BL]
    return packed_BL


def _pad_id(model: Any) -> int:
    """The padding token's id; where a model has none, any will do, because the mask hides it."""
    configs = (model.generation_config, model.config, model.config.get_text_config())
    return next((config.pad_token_id for config in configs if config.pad_token_id is not None), 0)
