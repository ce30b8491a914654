"""Greedy decoding as a `custom_generate` of transformers: a prompt leaves the batch when its answer ends.

Shapes: B prompts that are still answered, L tokens of a prompt with its answer so far, U distinct prefixes, Q
branches of a prefix, V words of the vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList

from atr.vlm.prefix import PrefixCache, SplitPrompts

_CACHES = "past_key_values", "cache"
"""Names under which versions of transformers hand over an empty cache, in place of which we make our own."""


@dataclass(frozen=True)
class _Prompts:
    """Prompts that are still answered: their numbers in the batch, and where each is in the cache."""

    number_B: Tensor
    ids_BL: Tensor
    position_B: Tensor
    """Position ids of the last token, (B,) or (axes, B)."""
    prefix_B: Tensor
    branch_B: Tensor

    def select(self, rows: Tensor) -> Self:
        per_prompt = ("number_B", "position_B", "prefix_B", "branch_B")
        chosen = {name: getattr(self, name)[..., rows] for name in per_prompt}
        return replace(self, ids_BL=self.ids_BL[rows], **chosen)

    def add(self, token_B: Tensor) -> Self:
        return replace(
            self, ids_BL=torch.cat([self.ids_BL, token_B[:, None]], 1), position_B=self.position_B + 1
        )


@torch.no_grad()
def decode_greedily(
    model: Any,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: Any,
    split: SplitPrompts | None = None,
    **inputs: Any,
) -> list[list[int]]:
    """The token ids of each prompt and its answer, without padding behind; `generate` gives the arguments.

    `split` are the same prompts split behind their images, to read each prefix once. With logits processors
    no prompt leaves, because one may count on the same rows in every step.
    """
    cache, prompts, logits_BV = _read(model, input_ids, split, inputs)
    sequences: list[list[int]] = input_ids.tolist()
    ended_B = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
    while True:
        prompts = prompts.add(logits_processor(prompts.ids_BL, logits_BV.float()).argmax(1))
        for number, token, ended in zip(
            prompts.number_B.tolist(), prompts.ids_BL[:, -1].tolist(), ended_B.tolist(), strict=True
        ):
            if not ended:
                sequences[number].append(token)
        ended_B = ended_B | stopping_criteria(prompts.ids_BL, None)
        if ended_B.all():
            return sequences
        if ended_B.any() and not logits_processor:
            prompts, ended_B = _drop(cache, prompts, ended_B), ended_B[~ended_B]
        last_B = prompts.ids_BL[:, -1]
        logits_BV = cache.read_next(last_B, prompts.position_B, prompts.prefix_B, prompts.branch_B)


def _read(
    model: Any, input_ids: Tensor, split: SplitPrompts | None, inputs: Mapping[str, Any]
) -> tuple[PrefixCache, _Prompts, Tensor]:
    """Read the prompts; the logits_BV behind them."""
    number_B = torch.arange(len(input_ids), device=input_ids.device)
    if split is None:
        given = {name: value for name, value in inputs.items() if name not in _CACHES}
        cache, logits_B1V = PrefixCache.prefill(model, {"input_ids": input_ids, **given})
        position_B, branch_B = inputs["position_ids"][..., -1], torch.zeros_like(number_B)
        return cache, _Prompts(number_B, input_ids, position_B, number_B, branch_B), logits_B1V[:, -1]
    cache, _ = PrefixCache.prefill(model, split.prefixes)
    logits_UQV = cache.extend(split.pack(), keep=int(split.branch_B.max()) + 1)
    position_B = split.suffixes["position_ids"][..., -1]
    prompts = _Prompts(number_B, input_ids, position_B, split.prefix_B, split.branch_B)
    return cache, prompts, logits_UQV[split.prefix_B, split.branch_B]


def _drop(cache: PrefixCache, prompts: _Prompts, ended_B: Tensor) -> _Prompts:
    """The prompts that have not ended; the cache keeps the prefixes that they have."""
    left = prompts.select(~ended_B)
    prefixes_U, prefix_B = torch.unique(left.prefix_B, return_inverse=True)
    if len(prefixes_U) < len(cache.owner_UC):
        cache.select(prefixes_U)
    return replace(left, prefix_B=prefix_B)
