"""Selects the tokens of each image with a reducer, over one tile or several; counts are exact.

Shapes: B tiles, N tokens of a tile, T tiles of an image, P packed tokens of an image, K kept tokens.
"""

import itertools
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
from atr.vlm.policy import ADAPTIVE, Policy
from atr.vlm.tiling import TileLayout

PER_TOKEN = ("attention_BN", "first_attention_BN", "keys_BND", "projected_BND")
"""Optional fields of EncoderOutput with a value per token; they are packed over tiles like the features."""

_NONE = torch.empty(0, dtype=torch.int64)


def as_reducer(reducer: Reducer | FeatureSelector) -> Reducer:
    """Wraps a selector in its default reducer: DistilledReducer if it was distilled, else SelectorReducer.

    Any other reducer is returned unchanged.
    """
    if not isinstance(reducer, FeatureSelector):
        return reducer
    return DistilledReducer(reducer) if reducer.is_taught else SelectorReducer(reducer)


def select_tokens(
    reducer: Reducer, encoded: EncoderOutput, layout: TileLayout, policy: Policy
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
        return list(select(reducer, encoded, tokens.budget(policy.keep, encoded.tokens)).cpu())
    groups = layout.groups(policy.budget)
    counts = [_share_budget(policy.keep, parts) for parts in groups]
    if isinstance(reducer, Apportioner) and policy.budget == "image":
        groups = layout.groups("tile")
        counts = _apportion(reducer, encoded, layout, groups, map(sum, counts))
    if isinstance(reducer, Scorer):
        return _keep_best(_packed_scores(reducer, encoded, layout), groups, counts)
    _check_tiles(reducer, layout)
    return [
        _in_order(
            _select_part(reducer, image, tile, *part)
            for tile, part in enumerate(zip(parts, part_counts, strict=True))
        )
        for image, parts, part_counts in zip(_pack(reducer, encoded, layout), groups, counts, strict=True)
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


def _pack(reducer: Reducer, encoded: EncoderOutput, layout: TileLayout) -> list[EncoderOutput]:
    """The packed tokens of each image as one set, with the fields that the reducer needs.

    `image_key_BX` of an image is that of all its tiles, (1, T, ...).
    """
    check_fields(reducer, encoded)
    features = layout.values(encoded.features_BND)
    images: list[dict[str, Any]] = [{"features_BND": features_PD[None]} for features_PD in features]
    for name in sorted(reducer.needs & set(PER_TOKEN)):
        values = getattr(encoded, name)
        is_scalar = values.ndim == 2
        packed = layout.values(values[..., None] if is_scalar else values)
        for image, packed_PC in zip(images, packed, strict=True):
            image[name] = packed_PC[None, :, 0] if is_scalar else packed_PC[None]
    bounds = itertools.accumulate(layout.tiling.tiles, initial=0)
    for image, (first, after) in zip(images, itertools.pairwise(bounds), strict=True):
        if encoded.text_BD is not None:
            image["text_BD"] = encoded.text_BD[first : first + 1]
        if encoded.image_key_BX is not None:
            image["image_key_BX"] = encoded.image_key_BX[None, first:after]
    return [EncoderOutput(grid=None, **image) for image in images]


def _select_adaptive(
    reducer: Reducer, encoded: EncoderOutput, layout: TileLayout, policy: Policy
) -> list[Tensor]:
    """As many tokens as the reducer counts in an image, or as have scores above its threshold; bounded."""
    if isinstance(reducer, Adaptive) and set(layout.tiling.tiles) == {1}:
        check_fields(reducer, encoded)
        counts = [_bound(int(count), policy.bounds, encoded.tokens) for count in reducer.counts(encoded)]
        return [kept_K.cpu() for kept_K in _select_each(reducer, encoded, counts)]
    if not isinstance(reducer, Scorer) or reducer.threshold is None:
        raise ValueError(
            f"keep: {ADAPTIVE} is not allowed for reducer {type(reducer).__name__}, "
            "which has no threshold; a selector trained with its reconstructor has one"
        )
    groups, scores = layout.groups(policy.budget), _packed_scores(reducer, encoded, layout)
    part_counts = []
    for scores_P, parts in zip(scores, groups, strict=True):
        above = [int((scores_P[part] > reducer.threshold).sum()) for part in parts]
        sizes = [len(part) for part in parts]
        part_counts.append(
            [_bound(count, policy.bounds, size) for count, size in zip(above, sizes, strict=True)]
        )
    return _keep_best(scores, groups, part_counts)


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
    firsts = itertools.accumulate(tiling.tiles[:-1], initial=0)
    return [
        reducer.apportion(encoded, first, arrangement, budget, [len(part) for part in parts])
        for first, arrangement, budget, parts in zip(
            firsts, tiling.arrangements, budgets, groups, strict=True
        )
    ]


def _packed_scores(reducer: Scorer, encoded: EncoderOutput, layout: TileLayout) -> list[Tensor]:
    """Scores of the packed tokens of each image, resampled like the features; (P,) each, on the CPU."""
    return [scores_P1[:, 0].cpu() for scores_P1 in layout.values(select_scores(reducer, encoded)[..., None])]


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


def _select_part(reducer: Reducer, image: EncoderOutput, tile: int, part_P: Tensor, count: int) -> Tensor:
    """Indices kept of a part of an image's packed tokens, which the reducer is given as one set.

    The part is `tile`, or the whole image, which is identified by its tile 0.
    """
    if not count and not isinstance(reducer, NoImage):
        return _NONE  # a small tile's share of a small budget
    part = {
        name: value.index_select(1, part_P.to(value.device))
        for name in ("features_BND", *PER_TOKEN)
        if (value := getattr(image, name)) is not None
    }
    if image.image_key_BX is not None:
        part["image_key_BX"] = image.image_key_BX[:, tile]
    return part_P[select(reducer, replace(image, **part), count)[0].cpu()]


def _in_order(parts: Iterable[Tensor]) -> Tensor:
    return torch.cat(list(parts)).sort().values
