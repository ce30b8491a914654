"""Which tokens of each image stay: a reducer asked under a policy, exact counts whatever the tiles."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from atr.core import tokens
from atr.core.layout import LAYOUT
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
from atr.vlm.families import Tiling
from atr.vlm.tiling import TileLayout

ADAPTIVE = "adaptive"
OF_A_TOKEN = ("attention_BN", "first_attention_BN", "keys_BND", "projected_BND")
"""What is known of a token wherever it lies, and so of those of several tiles as well."""
POSITIONS = "original"
"""The default wherever positions are asked for: selectors are taught and evaluated under it."""


_NONE = torch.empty(0, dtype=torch.int64)


def check_choice(key: str, value: str) -> None:
    """Raise ValueError for a value of a layout policy that there is not."""
    if value not in LAYOUT[key]:
        raise ValueError(f"{key}: {value!r} is unknown, allowed: {', '.join(LAYOUT[key])}")


@dataclass(frozen=True)
class Policy:
    """How many tokens of an image stay, and how; fields, meaning and errors as in `atr.vlm.reduce.reduce`."""

    keep: float | str
    positions: str = POSITIONS
    budget: str = "image"
    newline: str = "keep"
    bounds: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        for key in ("positions", "budget", "newline"):
            check_choice(key, getattr(self, key))
        if isinstance(self.keep, str):
            if self.keep != ADAPTIVE:
                raise ValueError(f"keep: {self.keep!r} is unknown, allowed: a fraction, a count, {ADAPTIVE}")
        else:
            object.__setattr__(self, "keep", _checked_keep(self.keep))
        object.__setattr__(self, "bounds", _checked_bounds(self.bounds))
        if self.keep != ADAPTIVE and self.bounds != (0.0, 1.0):
            raise ValueError(
                f"bounds: {self.bounds} is not allowed with keep {self.keep}, only with {ADAPTIVE}"
            )


def _checked_keep(given: float) -> float:
    keep = tokens.number("keep", given)
    if not _is_possible(keep):
        raise ValueError(f"keep: {keep} is out of range, allowed: a fraction 0 <= keep <= 1, or an int >= 0")
    return keep


def _checked_bounds(bounds: Sequence[float]) -> tuple[float, float]:
    allowed = "allowed: two fractions or counts, the lower first"
    if isinstance(bounds, str) or not hasattr(bounds, "__len__") or len(bounds) != 2:
        raise ValueError(f"bounds: {bounds!r} is not allowed, {allowed}")
    low, high = (tokens.number("bounds", bound) for bound in bounds)
    if not (_is_possible(low) and _is_possible(high)) or (type(low) is type(high) and low > high):
        raise ValueError(f"bounds: {(low, high)} is out of range, {allowed}")
    return low, high


def _is_possible(keep: float) -> bool:
    """Whether a count or fraction is one of some image, however many tokens it has."""
    return keep >= 0 and (isinstance(keep, int) or keep <= 1)


def as_reducer(reducer: Reducer | FeatureSelector) -> Reducer:
    """A trained selector as the best that is made of it: its best tokens, or those of one that was taught.

    Any other reducer as it is.
    """
    if not isinstance(reducer, FeatureSelector):
        return reducer
    return DistilledReducer(reducer) if reducer.is_taught else SelectorReducer(reducer)


def choose(reducer: Reducer | FeatureSelector, encoded: EncoderOutput, keep: float) -> Tensor:
    """Indices kept of each image in raster order, exactly `atr.core.tokens.budget(keep, N)`; int64 (B, K).

    Raises ValueError for `keep` out of range and for a reducer that needs what was not encoded.
    """
    return select(as_reducer(reducer), encoded, tokens.budget(keep, encoded.tokens))


def choose_packed(
    reducer: Reducer, encoded: EncoderOutput, packing: TileLayout, policy: Policy
) -> list[Tensor]:
    """Indices kept of the packed tokens of each image, newlines left out; int64 (K,) each, on the CPU.

    The tiles of an image share its budget by the scores of a reducer that gives scores, or as it apportions
    the budget where it does. One that needs neither grid nor pixels is asked for the packed tokens; any
    other, and one that merges, for images of one tile alone. Raises ValueError for a reducer that cannot do
    what is asked, and for `keep` or bounds out of range.
    """
    if policy.keep == ADAPTIVE:
        return _adaptive(reducer, encoded, packing, policy)
    assert not isinstance(policy.keep, str)
    if set(packing.tiling.tiles) == {1}:
        # One tile is packed in place.
        return list(choose(reducer, encoded, policy.keep).cpu())
    groups = packing.groups(policy.budget)
    counts = [_counts(policy.keep, parts) for parts in groups]
    if isinstance(reducer, Apportioner) and policy.budget == "image":
        groups = packing.groups("tile")
        counts = _apportioned(reducer, encoded, packing.tiling, groups, map(sum, counts))
    if isinstance(reducer, Scorer):
        return _best(_scores(reducer, encoded, packing), groups, counts)
    _check_tiles(reducer, packing)
    return [
        _in_order(
            _ask_part(reducer, image, tile, *part)
            for tile, part in enumerate(zip(parts, wanted, strict=True))
        )
        for image, parts, wanted in zip(_packed(reducer, encoded, packing), groups, counts, strict=True)
    ]


def needs_one_tile(reducer: Reducer) -> str:
    """Why a reducer is for images of one tile alone, empty for one that serves several as well.

    That one gives scores to compare them by, or takes tokens of several as one set and merges none.
    """
    if isinstance(reducer, Scorer):
        return ""
    if needed := sorted(reducer.needs - {*OF_A_TOKEN, "text_BD"}):
        return f"needs {needed[0]} and gives no scores to compare tiles by"
    return "merges tokens" if isinstance(reducer, Merger) else ""


def _check_tiles(reducer: Reducer, packing: TileLayout) -> None:
    if reason := needs_one_tile(reducer):
        raise ValueError(
            f"reducer {type(reducer).__name__} {reason}: it is allowed for images of one tile, not of "
            f"{max(packing.tiling.tiles)}"
        )


def _packed(reducer: Reducer, encoded: EncoderOutput, packing: TileLayout) -> list[EncoderOutput]:
    """The tokens of all tiles of each image as one set, with what the reducer reads of them.

    Its `image_key_BX` is that of all its tiles, (1, T, ...) for T of them.
    """
    check_fields(reducer, encoded)
    features = packing.values(encoded.features_BND)
    images: list[dict[str, Any]] = [{"features_BND": features_PD[None]} for features_PD in features]
    for name in sorted(reducer.needs & set(OF_A_TOKEN)):
        values = getattr(encoded, name)
        flat = values.ndim == 2
        for image, packed_PC in zip(
            images, packing.values(values[..., None] if flat else values), strict=True
        ):
            image[name] = packed_PC[None, :, 0] if flat else packed_PC[None]
    first = [0, *itertools.accumulate(packing.tiling.tiles)]
    for image, (tile, after) in zip(images, itertools.pairwise(first), strict=True):
        if encoded.text_BD is not None:
            image["text_BD"] = encoded.text_BD[tile : tile + 1]
        if encoded.image_key_BX is not None:
            image["image_key_BX"] = encoded.image_key_BX[None, tile:after]
    return [EncoderOutput(grid=None, **image) for image in images]


def _adaptive(reducer: Reducer, encoded: EncoderOutput, packing: TileLayout, policy: Policy) -> list[Tensor]:
    """As many tokens as an image needs, within the bounds: by the reducer's count, or above its threshold."""
    if isinstance(reducer, Adaptive) and set(packing.tiling.tiles) == {1}:
        check_fields(reducer, encoded)
        wanted = [_bounded(int(count), policy.bounds, encoded.tokens) for count in reducer.counts(encoded)]
        return [kept_K.cpu() for kept_K in ask_each(reducer, encoded, wanted)]
    if not isinstance(reducer, Scorer) or reducer.threshold is None:
        raise ValueError(
            f"keep: {ADAPTIVE} is not allowed for reducer {type(reducer).__name__}, "
            "which has no threshold; a selector trained with its reconstructor has one"
        )
    groups, scores = packing.groups(policy.budget), _scores(reducer, encoded, packing)
    counts = []
    for scores_P, parts in zip(scores, groups, strict=True):
        above = [int((scores_P[part] > reducer.threshold).sum()) for part in parts]
        sizes = [len(part) for part in parts]
        counts.append(
            [_bounded(count, policy.bounds, size) for count, size in zip(above, sizes, strict=True)]
        )
    return _best(scores, groups, counts)


def _bounded(count: int, bounds: tuple[float, float], size: int) -> int:
    """The count within the bounds; a bound that is a count of more tokens than there are means all."""
    low, high = (
        tokens.budget(min(bound, size) if isinstance(bound, int) else bound, size) for bound in bounds
    )
    if low > high:
        raise ValueError(f"bounds: {bounds} are {low} and {high} of {size} tokens, allowed: low <= high")
    return min(max(count, low), high)


def _counts(keep: float, parts: Sequence[Tensor]) -> list[int]:
    """The image's budget shared over its parts in proportion to their tokens."""
    sizes = [len(part) for part in parts]
    return shares(tokens.budget(keep, sum(sizes)), sizes)


def _apportioned(
    reducer: Apportioner,
    encoded: EncoderOutput,
    tiling: Tiling,
    groups: Sequence[Sequence[Tensor]],
    budgets: Iterable[int],
) -> list[list[int]]:
    """Each image's budget split by the reducer over its tiles, the groups."""
    check_fields(reducer, encoded)
    firsts = itertools.accumulate(tiling.tiles[:-1], initial=0)
    return [
        reducer.apportion(encoded, first, arrangement, budget, [len(part) for part in parts])
        for first, arrangement, budget, parts in zip(
            firsts, tiling.arrangements, budgets, groups, strict=True
        )
    ]


def _scores(reducer: Scorer, encoded: EncoderOutput, packing: TileLayout) -> list[Tensor]:
    """Scores of the packed tokens, having gone the way of the features; (P,) each."""
    return [scores_P1[:, 0].cpu() for scores_P1 in packing.values(select_scores(reducer, encoded)[..., None])]


def _best(
    scores: Sequence[Tensor], groups: Sequence[Sequence[Tensor]], counts: Sequence[Sequence[int]]
) -> list[Tensor]:
    return [
        _in_order(part[top_k_BK(scores_P[part], count)] for part, count in zip(parts, wanted, strict=True))
        for scores_P, parts, wanted in zip(scores, groups, counts, strict=True)
    ]


def ask_each(reducer: Reducer, encoded: EncoderOutput, counts: Sequence[int]) -> list[Tensor]:
    """Indices kept of each image, as many as its own count says; int64 (K,) each."""
    kept: dict[int, Tensor] = {}
    for count in sorted(set(counts)):
        images = [image for image, wanted in enumerate(counts) if wanted == count]
        chosen = select(reducer, encoded.of(images), count) if count else _NONE.expand(len(images), 0)
        kept |= dict(zip(images, chosen, strict=True))
    return [kept[image] for image in range(len(counts))]


def _ask_part(reducer: Reducer, image: EncoderOutput, tile: int, part_N: Tensor, count: int) -> Tensor:
    """Which of a part's tokens, taken as a set, a reducer keeps; indices into the packed tokens.

    The part is that `tile`, or all of the image, which is told apart by tile 0: that one shows it whole.
    """
    if not count and not isinstance(reducer, NoImage):
        return _NONE  # a small tile's share of a small budget
    part = {
        name: value.index_select(1, part_N.to(value.device))
        for name in ("features_BND", *OF_A_TOKEN)
        if (value := getattr(image, name)) is not None
    }
    if image.image_key_BX is not None:
        part["image_key_BX"] = image.image_key_BX[:, tile]
    return part_N[select(reducer, replace(image, **part), count)[0].cpu()]


def _in_order(parts: Iterable[Tensor]) -> Tensor:
    return torch.cat(list(parts)).sort().values
