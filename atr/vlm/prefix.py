"""Prompts that begin with the same images: their prefix is read once, and each prompt branches off from it.

A prefix ends with the last visual token of a prompt. Its keys and values lie in the cache once; the texts
behind it, its branches, stand side by side under a mask that keeps them apart. Position ids are (B, L), or
(axes, B, L) for models that number rows and columns of an image, too. Shapes: B prompts, L tokens of a
prompt, U distinct prefixes, Q branches of a prefix, S tokens of a prefix, T tokens behind it, C columns of
the cache, V words of the vocabulary.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import Any, Self

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from atr.vlm.compatibility import takes_positions
from atr.vlm.families import family_of
from atr.vlm.families.rule import Rule
from atr.vlm.image_tokens import TokenList, VisualOutput
from atr.vlm.sequence import TOKEN_TYPES, image_bounds, pack_left, pad_id, placeholders, position_ids

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
    if not takes_positions(model):
        return f"{text.model_type} takes no position ids"
    family = family_of(model)
    if isinstance(family, Rule) and family.entry.carried:  # which are read with the images alone
        return f"{model.config.model_type} embeds tokens of the text by {family.entry.carried[0]}"
    if _sees_ahead(model):
        kind = model.config.model_type
        return f"{kind} lets the tokens of a prefix see later ones, its attention is not causal"
    return ""


def _sees_ahead(model: Any) -> bool:
    """Whether tokens of an image, or of a whole prefix, attend to later ones."""
    kind = type(model)
    if "token_type_ids" in signature(kind.forward).parameters:  # as Gemma 3 and PaliGemma name them
        return True
    # Gemma 4 does so by its configuration; others make masks of their own for the same reason.
    mode = getattr(model.config.get_text_config(), "use_bidirectional_attention", "unknown")
    return hasattr(kind, "create_masks_for_generate") and mode is not None


@dataclass(frozen=True)
class SplitPrompts:
    """Prompts split behind their last visual token.

    `prefixes` is an input for `prefill` with each distinct prefix once. `suffixes` has `input_ids` and
    `attention_mask` (B, T) of the text behind it, `position_ids` (B, T) or (axes, B, T), and the token types
    that the model reads. Both are left-padded. A prompt is branch `branch_B` of prefix `prefix_B`; both int64
    (B,).
    """

    prefixes: dict[str, Any]
    suffixes: dict[str, Tensor]
    prefix_B: Tensor
    branch_B: Tensor

    def pack(self) -> "Branches":
        """The suffixes of each prefix side by side.

        The last tokens of the suffixes are the last columns, in the order of the branches.
        """
        mask_BT = self.suffixes["attention_mask"].bool()
        branch_BT = self.branch_B[:, None].where(mask_BT, NO_BRANCH)
        at = self.prefix_B, self.branch_B
        stay_UC = _side_by_side(branch_BT, at, NO_BRANCH)[:, : -int(self.branch_B.max()) - 1] != NO_BRANCH

        def pack(values_BT: Tensor, fill: int = 0) -> Tensor:
            return _pack_bodies(_side_by_side(values_BT, at, fill), stay_UC, fill)

        rest = {name: pack(values) for name, values in self.suffixes.items() if name != "attention_mask"}
        return Branches(
            rest.pop("input_ids"), rest.pop("position_ids"), pack(branch_BT, NO_BRANCH), token_types=rest
        )


@dataclass(frozen=True)
class Branches:
    """Tokens (U, T) of branches side by side; position ids (U, T) or (axes, U, T)."""

    ids_UT: Tensor
    positions_UT: Tensor
    branch_UT: Tensor
    token_types: Mapping[str, Tensor] = field(default_factory=dict)


def _side_by_side(values_BT: Tensor, at: tuple[Tensor, Tensor], fill: int) -> Tensor:
    """All but the last values of each prompt, then the last ones; (U, columns), or (axes, U, columns)."""
    if values_BT.ndim == 3:
        return torch.stack([_side_by_side(of_axis_BT, at, fill) for of_axis_BT in values_BT])
    block_UQT = place(values_BT, at, fill)
    return torch.cat([block_UQT[..., :-1].flatten(1), block_UQT[..., -1]], dim=1)


def _pack_bodies(values_UC: Tensor, stay_UC: Tensor, fill: int) -> Tensor:
    """Leave out padding before the last columns, which `stay_UC` does not count."""
    body_UC, end_UQ = values_UC.tensor_split([stay_UC.shape[1]], dim=-1)
    if not stay_UC.shape[1]:
        return end_UQ
    return torch.cat([pack_left(body_UC, stay_UC, fill), end_UQ], dim=-1)


def place(values_BX: Tensor, at: tuple[Tensor, Tensor], fill: int) -> Tensor:
    """A block (U, Q, X) of `fill` with the values of each prompt `at` its row and place, int64 (B,) each."""
    shape = (int(index_B.max()) + 1 for index_B in at)
    return values_BX.new_full((*shape, *values_BX.shape[1:]), fill).index_put(at, values_BX)


def split_prompts(model: Any, inputs: Mapping[str, Any], images: Sequence[Hashable]) -> SplitPrompts | None:
    """Split the prompts of a shortened input; None if one has no image, or no text behind its images.

    `images` says what each image among the placeholders shows: equal items have equal features. Prefixes are
    the same if their token ids, positions and images are.
    """
    ids_BL, real_BL = inputs["input_ids"], inputs["attention_mask"].bool()
    placeholder_BL = placeholders(model, inputs)
    if not placeholder_BL.any(1).all() or placeholder_BL[:, -1].any():
        return None
    before_BL = real_BL & (placeholder_BL.flip(1).cumsum(1).flip(1) > 0)
    given = inputs.get("position_ids")
    positions = position_ids(model, inputs) if given is None else given
    per_token = {"input_ids": ids_BL, "position_ids": positions}
    per_token |= {name: inputs[name] for name in TOKEN_TYPES if name in inputs}
    per_token["attention_mask"] = inputs["attention_mask"]
    output = inputs["mm_encoder_outputs"]["image"]
    bounds = image_bounds(placeholder_BL, [len(tokens_KD) for tokens_KD in output.pooler_output])
    row_R = placeholder_BL.nonzero()[bounds[:-1], 0].tolist()
    shown: list[list[Hashable]] = [[] for _ in ids_BL]
    for row, image in zip(row_R, images, strict=True):
        shown[row].append(image)
    first, prefix_B, branch_B = _number(_keys(per_token, before_BL, shown))
    prefixes: dict[str, Any] = {
        name: pack_left(values[..., first, :], before_BL[first], _fill(model, name))
        for name, values in per_token.items()
    }
    kept = [image for image, row in enumerate(row_R) if row in set(first)]
    prefixes["mm_encoder_outputs"] = {"image": _of_images(output, kept)}
    after_BL = real_BL & ~before_BL
    suffixes = {name: pack_left(values, after_BL, _fill(model, name)) for name, values in per_token.items()}
    numbers = (torch.tensor(number, device=ids_BL.device) for number in (prefix_B, branch_B))
    return SplitPrompts(prefixes, suffixes, *numbers)


def _fill(model: Any, name: str) -> int:
    return pad_id(model) if name == "input_ids" else 0


def _of_images(output: VisualOutput, images: Sequence[int]) -> VisualOutput:
    """The output for some of its images."""
    levels = output.deepstack_features
    fields = {
        "pooler_output": TokenList([output.pooler_output[image] for image in images]),
        "deepstack_features": levels and [TokenList([level[image] for image in images]) for level in levels],
    }
    return VisualOutput(**{**output, **fields})


def _keys(
    per_token: Mapping[str, Tensor], before_BL: Tensor, shown: Sequence[Sequence[Hashable]]
) -> list[Hashable]:
    """What distinguishes the prefixes of the rows: their images, token ids, positions and token types."""
    before = before_BL.cpu().numpy()
    values = [values.cpu().numpy() for values in per_token.values()]
    return [
        (*(of_tokens[..., row, :][..., before[row]].tobytes() for of_tokens in values), *images)
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

    def extend(self, tokens: Branches, keep: int = 0) -> Tensor:
        """Read tokens of branches, or of NO_BRANCH; logits (U, T, V), or of the last `keep` tokens."""
        self.owner_UC = torch.cat([self.owner_UC, tokens.branch_UT], dim=1)
        logits_UTV: Tensor = self.model(
            input_ids=tokens.ids_UT,
            attention_mask=self._mask(tokens.branch_UT),
            position_ids=tokens.positions_UT,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=keep,
            **tokens.token_types,
        ).logits
        return logits_UTV

    def read_next(self, ids_B: Tensor, positions_B: Tensor, prefix_B: Tensor, branch_B: Tensor) -> Tensor:
        """Read one more token of each prompt, a branch of a prefix; the logits_BV behind it.

        Its position on each axis is given, (B,) or (axes, B).
        """
        at = prefix_B, (prefix_B[:, None] == prefix_B).tril(-1).sum(1)
        ids_UQ, branch_UQ = place(ids_B, at, fill=0), place(branch_B, at, fill=NO_BRANCH)
        axes = [place(of_axis_B, at, fill=0) for of_axis_B in positions_B.reshape(-1, len(ids_B))]
        positions_UQ = torch.stack(axes) if positions_B.ndim == 2 else axes[0]
        return self.extend(Branches(ids_UQ, positions_UQ, branch_UQ))[at]

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
