"""Selects the tokens of each image with a reducer, over one tile or several; counts are exact.

Shapes: B tiles, N tokens of a tile, T tiles of an image, P packed tokens of an image, K kept tokens.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from atr.core import tokens
from atr.core.tokens import shares, top_k_BK
from atr.reduction import (
    Adaptive,
    EncoderOutput,
    FeatureSelector,
    Merger,
    NoImage,
    Reducer,
    Scorer,
    SelectorReducer,
)
from atr.reduction.base import Apportioner
from atr.reduction.checked import check_fields, select, select_scores
from atr.reduction.distilled import DistilledReducer
from atr.reduction.layer_schedule import LEFT_OUT, LayerReducer
from atr.vlm.encoded_tiles import EncodedTiles
from atr.vlm.policy import ADAPTIVE, Policy
from atr.vlm.tiling import TileLayout

PER_TOKEN = ("attention_BN", "first_attention_BN", "keys_BND", "projected_BND")
"""Optional fields of EncoderOutput with a value per token; they are packed over tiles like the features."""

_NONE = torch.empty(0, dtype=torch.int64)


def as_reducer(reducer: Reducer | FeatureSelector) -> Reducer:
    """Wraps a selector in its default reducer: DistilledReducer if it was distilled, else SelectorReducer.

    Any other reducer is returned unchanged. Raises ValueError for what is none, and for a reducer that works
    between the layers of a language model.
    """
    if isinstance(reducer, FeatureSelector):
        return DistilledReducer(reducer) if reducer.is_taught else SelectorReducer(reducer)
    if isinstance(reducer, type) or not hasattr(reducer, "needs"):
        given = " ".join(repr(reducer).split())
        raise ValueError(f"reducer: {given} is none, allowed: a FeatureSelector, or what build_reducer gives")
    if isinstance(reducer, LayerReducer):
        raise ValueError(
            f"reducer: {type(reducer).__name__} {LEFT_OUT}, allowed: one that chooses before it, or "
            "prune_layers of atr.vlm.in_llm"
        )
    return reducer


def select_tokens(
    reducer: Reducer, encoded: EncodedTiles, layout: TileLayout, policy: Policy
) -> list[Tensor]:
    """Indices kept of the packed tokens of each image, without newlines; int64 (K,) each, on the CPU.

    If images have several tiles, a Scorer compares their tokens by score, and an Apportioner splits the
    budget over the tiles. A reducer that needs neither grid nor pixels is given the packed tokens of an
    image as one set. Any other reducer, and one that merges, serves images of one tile only. Raises
    ValueError for such a reducer on several tiles, for `keep` or bounds out of range, and as
    `atr.reduction.checked.select` does.
    """
    if policy.keep == ADAPTIVE:
        return _select_adaptive(reducer, encoded, layout, policy)
    assert not isinstance(policy.keep, str)
    if set(layout.tiling.tiles) == {1}:  # packed in place
        keep = policy.keep
        kept = [select(reducer, group, tokens.budget(keep, group.tokens)).cpu() for group in encoded.groups]
        return encoded.by_tile(kept)
    groups = layout.groups(policy.budget)
    counts = [_share_budget(policy.keep, parts) for parts in groups]
    if isinstance(reducer, Apportioner) and policy.budget == "image":
        groups = layout.groups("tile")
        counts = _apportion(reducer, encoded.whole, layout, groups, map(sum, counts))
    if isinstance(reducer, Scorer):
        scores = encoded.by_tile([select_scores(reducer, group) for group in encoded.groups])
        return _keep_best(_pack_scores(scores, layout), groups, counts)
    _check_tiles(reducer, layout)
    keys = encoded.value("image_key_BX") if encoded.has("image_key_BX") else []
    return [
        _in_order(
            _select_part(reducer, image, keys[first + tile] if keys else None, *part)
            for tile, part in enumerate(zip(parts, part_counts, strict=True))
        )
        for image, first, parts, part_counts in zip(
            _pack(reducer, encoded, layout), layout.tiling.firsts[:-1], groups, counts, strict=True
        )
    ]


def _check_tiles(reducer: Reducer, layout: TileLayout) -> None:
    """Raise ValueError if a reducer without scores cannot take the tokens of several tiles as one set."""
    needed = sorted(reducer.needs - {*PER_TOKEN, "text_BD"})
    if needed or isinstance(reducer, Merger):
        reason = f"needs {needed[0]} and gives no scores to compare tiles by" if needed else "merges tokens"
        raise ValueError(
            f"reducer {type(reducer).__name__} {reason}: it is allowed for images of one tile, not of "
            f"{max(layout.tiling.tiles)}"
        )


def _pack(reducer: Reducer, encoded: EncodedTiles, layout: TileLayout) -> list[EncoderOutput]:
    """The packed tokens of each image as one set, with the fields that the reducer needs."""
    for group in encoded.groups:
        check_fields(reducer, group)
    features = layout.values(encoded.value("features_BND"))
    images: list[dict[str, Any]] = [{"features_BND": features_PD[None]} for features_PD in features]
    for name in sorted(reducer.needs & set(PER_TOKEN)):
        values = encoded.value(name)
        is_scalar = values[0].ndim == 1
        packed = layout.values([value_N[:, None] for value_N in values] if is_scalar else values)
        for image, packed_PC in zip(images, packed, strict=True):
            image[name] = packed_PC[None, :, 0] if is_scalar else packed_PC[None]
    if encoded.has("text_BD"):
        text = encoded.value("text_BD")
        for image, first in zip(images, layout.tiling.firsts, strict=False):
            image["text_BD"] = text[first][None]
    return [EncoderOutput(grid=None, **image) for image in images]


def _select_adaptive(
    reducer: Reducer, encoded: EncodedTiles, layout: TileLayout, policy: Policy
) -> list[Tensor]:
    """As many tokens as the reducer counts in an image, or as have scores above its threshold; bounded."""
    if isinstance(reducer, Adaptive) and set(layout.tiling.tiles) == {1}:
        return encoded.by_tile([_select_counted(reducer, group, policy) for group in encoded.groups])
    if not isinstance(reducer, Scorer) or reducer.threshold is None:
        raise ValueError(
            f"keep: {ADAPTIVE} is not allowed for reducer {type(reducer).__name__}, "
            "which has no threshold; a selector trained with its reconstructor has one"
        )
    of_tiles = encoded.by_tile([select_scores(reducer, group) for group in encoded.groups])
    groups, scores = layout.groups(policy.budget), _pack_scores(of_tiles, layout)
    part_counts = []
    for scores_P, parts in zip(scores, groups, strict=True):
        above = [int((scores_P[part] > reducer.threshold).sum()) for part in parts]
        sizes = [len(part) for part in parts]
        part_counts.append(
            [_bound(count, policy.bounds, size) for count, size in zip(above, sizes, strict=True)]
        )
    return _keep_best(scores, groups, part_counts)


def _select_counted(reducer: Adaptive, encoded: EncoderOutput, policy: Policy) -> list[Tensor]:
    """Indices kept of each image, as many as the reducer counts, bounded."""
    check_fields(reducer, encoded)
    counts = [_bound(int(count), policy.bounds, encoded.tokens) for count in reducer.counts(encoded)]
    return [kept_K.cpu() for kept_K in _select_each(reducer, encoded, counts)]


def _bound(count: int, bounds: tuple[float, float], size: int) -> int:
    """The count within the bounds; a bound above `size` that is a count means all tokens."""
    low, high = (
        tokens.budget(min(bound, size) if isinstance(bound, int) else bound, size) for bound in bounds
    )
    if low > high:
        raise ValueError(f"bounds: {bounds} are {low} and {high} of {size} tokens, allowed: low <= high")
    return min(max(count, low), high)


def _share_budget(keep: float, parts: Sequence[Tensor]) -> list[int]:
    """An image's budget shared over its parts in proportion to their tokens."""
    sizes = [len(part) for part in parts]
    return shares(tokens.budget(keep, sum(sizes)), sizes)


def _apportion(
    reducer: Apportioner,
    encoded: EncoderOutput,
    layout: TileLayout,
    groups: Sequence[Sequence[Tensor]],
    budgets: Iterable[int],
) -> list[list[int]]:
    """Each image's budget split by the reducer over the image's tiles, which are the groups."""
    check_fields(reducer, encoded)
    tiling = layout.tiling
    return [
        reducer.apportion(encoded, first, arrangement, budget, [len(part) for part in parts])
        for first, arrangement, budget, parts in zip(
            tiling.firsts[:-1], tiling.arrangements, budgets, groups, strict=True
        )
    ]


def _pack_scores(scores: Sequence[Tensor], layout: TileLayout) -> list[Tensor]:
    """Scores of the packed tokens of each image, resampled like the features; (P,) each, on the CPU."""
    columns = [scores_N[:, None] for scores_N in scores]
    return [scores_P1[:, 0].cpu() for scores_P1 in layout.values(columns)]


def _keep_best(
    scores: Sequence[Tensor], groups: Sequence[Sequence[Tensor]], counts: Sequence[Sequence[int]]
) -> list[Tensor]:
    """The tokens with the highest scores of each group, as many as its count; (K,) per image."""
    return [
        _in_order(
            part[top_k_BK(scores_P[part], count)] for part, count in zip(parts, part_counts, strict=True)
        )
        for scores_P, parts, part_counts in zip(scores, groups, counts, strict=True)
    ]


def _select_each(reducer: Reducer, encoded: EncoderOutput, counts: Sequence[int]) -> list[Tensor]:
    """Indices kept of each image, as many as its own count; int64 (K,) each."""
    kept: dict[int, Tensor] = {}
    for count in sorted(set(counts)):
        images = [image for image, own in enumerate(counts) if own == count]
        keep_BK = select(reducer, encoded.of(images), count) if count else _NONE.expand(len(images), 0)
        kept |= dict(zip(images, keep_BK, strict=True))
    return [kept[image] for image in range(len(counts))]


def _select_part(
    reducer: Reducer, image: EncoderOutput, image_key_X: Tensor | None, part_P: Tensor, count: int
) -> Tensor:
    """Indices kept of a part of an image's packed tokens, which the reducer is given as one set.

    The part is a tile with its key, or the whole image, which is identified by its tile 0.
    """
    if not count and not isinstance(reducer, NoImage):
        return _NONE  # a small tile's share of a small budget
    part = {
        name: value.index_select(1, part_P.to(value.device))
        for name in ("features_BND", *PER_TOKEN)
        if (value := getattr(image, name)) is not None
    }
    if image_key_X is not None:
        part["image_key_BX"] = image_key_X[None]
    return part_P[select(reducer, replace(image, **part), count)[0].cpu()]


def _in_order(parts: Iterable[Tensor]) -> Tensor:
    return torch.cat(list(parts)).sort().values
