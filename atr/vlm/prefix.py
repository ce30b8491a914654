"""Prompts that begin with the same images: their prefix is read once, and each prompt branches off from it.

A prefix ends with the last visual token of a prompt. Its keys and values lie in the cache once; the texts
behind it, its branches, stand side by side under a mask that keeps them apart. Shapes: B prompts, L tokens of
a prompt, U distinct prefixes, Q branches of a prefix, S tokens of a prefix, T tokens behind it, C columns of
the cache, V words of the vocabulary.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any, Self

import torch
from torch import Tensor
from transformers import MODEL_MAPPING, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling

from atr.vlm.sequence import image_bounds, pack_left, pad_id, placeholders

ALL_BRANCHES = -1
"""Owner of a cache column that all branches of a row read."""
NO_BRANCH = -2
"""Owner of a cache column that no branch reads."""


def why_not_shared(model: Any) -> str:
    """Why prompts cannot branch off from a prefix of this model; empty if they can.

    The reason names the part of the model's configuration.
    """
    text = model.config.get_text_config()
    attention = str(text._attn_implementation)
    if attention not in ("eager", "sdpa"):
        return f"attention kernel {attention} takes no mask of its own for each token"
    layers = {type(layer) for layer in DynamicCache(config=text).layers}
    if others := sorted(layer.__name__ for layer in layers - {DynamicLayer}):
        return f"the cache of {text.model_type} has layers of type {others[0]}"
    if "position_ids" not in signature(MODEL_MAPPING[type(text)].forward).parameters:
        return f"{text.model_type} takes no position ids"
    # Such models let the tokens of a prefix see each other, and some its text too.
    if {"token_type_ids", "mm_token_type_ids"} & set(signature(type(model).forward).parameters):
        return f"{model.config.model_type} distinguishes token types, so that attention may not be causal"
    return ""


@dataclass(frozen=True)
class SplitPrompts:
    """Prompts split behind their last visual token.

    `prefixes` is an input for `prefill` with each distinct prefix once. `suffixes` has `input_ids`,
    `attention_mask` and `position_ids` (B, T) of the text behind it. Both are left-padded. A prompt is branch
    `branch_B` of prefix `prefix_B`; both int64 (B,).
    """

    prefixes: dict[str, Any]
    suffixes: dict[str, Tensor]
    prefix_B: Tensor
    branch_B: Tensor

    def pack(self) -> tuple[Tensor, Tensor, Tensor]:
        """The suffixes of each prefix side by side: ids, position ids and branches, (U, columns) each.

        The last tokens of the suffixes are the last columns, in the order of the branches.
        """
        ids_BT, positions_BT = self.suffixes["input_ids"], self.suffixes["position_ids"]
        branch_BT = self.branch_B[:, None].where(self.suffixes["attention_mask"].bool(), NO_BRANCH)
        parts = ((ids_BT, 0), (positions_BT, 0), (branch_BT, NO_BRANCH))
        at = self.prefix_B, self.branch_B
        last = [place(values_BT[:, -1], at, fill) for values_BT, fill in parts]
        if ids_BT.shape[1] == 1:
            return last[0], last[1], last[2]
        bodies = [place(values_BT[:, :-1], at, fill).flatten(1) for values_BT, fill in parts]
        stay = bodies[2] != NO_BRANCH
        packed = [
            torch.cat([pack_left(body, stay, fill), end], dim=1)
            for body, end, (_, fill) in zip(bodies, last, parts, strict=True)
        ]
        return packed[0], packed[1], packed[2]


def place(values_BX: Tensor, at: tuple[Tensor, Tensor], fill: int) -> Tensor:
    """A block (U, Q, X) of `fill` with the values of each prompt `at` its row and place, int64 (B,) each."""
    shape = (int(index_B.max()) + 1 for index_B in at)
    return values_BX.new_full((*shape, *values_BX.shape[1:]), fill).index_put(at, values_BX)


def split_prompts(model: Any, inputs: Mapping[str, Any], images: Sequence[Hashable]) -> SplitPrompts | None:
    """Split the prompts of a shortened input; None if one has no image, or no text behind its images.

    `images` says what each run of placeholders shows: equal items have equal features. Prefixes are the same
    if their token ids, positions and images are.
    """
    ids_BL, real_BL = inputs["input_ids"], inputs["attention_mask"].bool()
    placeholder_BL = placeholders(model, inputs)
    if not placeholder_BL.any(1).all() or placeholder_BL[:, -1].any():
        return None
    positions_BL = inputs.get("position_ids")
    if positions_BL is None:
        positions_BL = (real_BL.long().cumsum(1) - 1).clamp(min=0)
    before_BL = real_BL & (placeholder_BL.flip(1).cumsum(1).flip(1) > 0)
    after_BL = real_BL & ~before_BL
    features = inputs["mm_encoder_outputs"]["image"].pooler_output
    bounds = image_bounds(placeholder_BL, [len(features_KD) for features_KD in features])
    row_R = placeholder_BL.nonzero()[bounds[:-1], 0].tolist()
    shown: list[list[Hashable]] = [[] for _ in ids_BL]
    for row, image in zip(row_R, images, strict=True):
        shown[row].append(image)
    first, prefix_B, branch_B = _number(_keys(ids_BL, positions_BL, before_BL, shown))
    parts = {"input_ids": (ids_BL, pad_id(model)), "position_ids": (positions_BL, 0)}
    parts["attention_mask"] = inputs["attention_mask"], 0
    prefixes: dict[str, Any] = {
        name: pack_left(values_BL[first], before_BL[first], fill) for name, (values_BL, fill) in parts.items()
    }
    kept = [features_KD for row, features_KD in zip(row_R, features, strict=True) if row in set(first)]
    prefixes["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=kept)}
    suffixes = {name: pack_left(values_BL, after_BL, fill) for name, (values_BL, fill) in parts.items()}
    numbers = (torch.tensor(number, device=ids_BL.device) for number in (prefix_B, branch_B))
    return SplitPrompts(prefixes, suffixes, *numbers)


def _keys(
    ids_BL: Tensor, positions_BL: Tensor, before_BL: Tensor, shown: Sequence[Sequence[Hashable]]
) -> list[Hashable]:
    """What distinguishes the prefixes of the rows."""
    ids, positions, before = (values.cpu().numpy() for values in (ids_BL, positions_BL, before_BL))
    return [
        (ids[row][before[row]].tobytes(), positions[row][before[row]].tobytes(), *images)
        for row, images in enumerate(shown)
    ]


def _number(keys: Sequence[Hashable]) -> tuple[list[int], list[int], list[int]]:
    """First row of each distinct key; and of each row, the key's number and how often it came before."""
    first: dict[Hashable, int] = {}
    seen: dict[Hashable, int] = {}
    repeats = []
    for row, key in enumerate(keys):
        first.setdefault(key, row)
        repeats.append(seen.get(key, 0))
        seen[key] = repeats[-1] + 1
    numbers = {key: number for number, key in enumerate(first)}
    return list(first.values()), [numbers[key] for key in keys], repeats


class PrefixCache:
    """Keys and values of U prefixes and of the branches behind each; gradients pass through.

    `owner_UC` of a column is the branch that reads it, ALL_BRANCHES if all of its row do, or NO_BRANCH.
    """

    def __init__(self, model: Any, cache: DynamicCache, owner_UC: Tensor) -> None:
        self.model, self.cache, self.owner_UC = model, cache, owner_UC

    @classmethod
    def prefill(cls, model: Any, inputs: Mapping[str, Any]) -> tuple[Self, Tensor]:
        """Read the inputs; the cache and the logits_U1V behind the last token."""
        cache = DynamicCache(config=model.config.get_text_config())
        given = {**inputs, "past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
        logits_U1V = model(**given).logits
        mask_US = inputs.get("attention_mask")
        if mask_US is None:  # as generate leaves it out where nothing is padded
            mask_US = torch.ones_like(inputs["input_ids"])
        owner_US = torch.where(mask_US.bool(), ALL_BRANCHES, NO_BRANCH)
        return cls(model, cache, owner_US), logits_U1V

    def extend(self, ids_UT: Tensor, positions_UT: Tensor, branch_UT: Tensor, keep: int = 0) -> Tensor:
        """Read tokens of branches, or of NO_BRANCH; logits (U, T, V), or of the last `keep` tokens."""
        self.owner_UC = torch.cat([self.owner_UC, branch_UT], dim=1)
        logits_UTV: Tensor = self.model(
            input_ids=ids_UT,
            attention_mask=self._mask(branch_UT),
            position_ids=positions_UT,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=keep,
        ).logits
        return logits_UTV

    def read_next(self, ids_B: Tensor, positions_B: Tensor, prefix_B: Tensor, branch_B: Tensor) -> Tensor:
        """Read one more token of each prompt, a branch of a prefix; the logits_BV behind it."""
        at = prefix_B, (prefix_B[:, None] == prefix_B).tril(-1).sum(1)
        ids_UQ, positions_UQ = (place(values_B, at, fill=0) for values_B in (ids_B, positions_B))
        return self.extend(ids_UQ, positions_UQ, place(branch_B, at, fill=NO_BRANCH))[at]

    def select(self, rows: Tensor) -> None:
        """Keep only these rows of the cache."""
        self.cache.batch_select_indices(rows)
        self.owner_UC = self.owner_UC[rows]

    def _mask(self, branch_UT: Tensor) -> Tensor:
        """The additive mask (U, 1, T, C): a token sees the prefix and its branch up to itself."""
        owner_U1C, branch_UT1 = self.owner_UC[:, None], branch_UT[..., None]
        columns, tokens = owner_U1C.shape[-1], branch_UT.shape[1]
        later_TC = torch.ones(tokens, columns, dtype=torch.bool, device=branch_UT.device)
        later_TC = later_TC.triu(columns - tokens + 1)
        hidden_UTC = later_TC | ((owner_U1C != ALL_BRANCHES) & (owner_U1C != branch_UT1))
        dtype = self.model.get_input_embeddings().weight.dtype  # the tower may have another
        mask_UTC = torch.zeros(hidden_UTC.shape, dtype=dtype, device=hidden_UTC.device)
        return mask_UTC.masked_fill(hidden_UTC, torch.finfo(dtype).min)[:, None]
