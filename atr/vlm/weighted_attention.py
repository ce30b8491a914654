"""Language model passes over packed prompts whose tokens have weights in attention, with gradients to these.

The sequences of a batch stand one after another in a single row, without padding, and attention takes them one
by one. Shapes: T tokens of a sequence, S tokens of all sequences, A predicted tokens of all, V words of the
vocabulary, H heads, d channels of a head.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.modeling_outputs import BaseModelOutputWithPooling

from atr.vlm.prefix import PREFIX

DROPPED_WEIGHT = 1e-3
"""Attention weight left to a dropped token; at zero it would get no gradient."""
_NAME = "atr_weighted"


@dataclass(frozen=True)
class WeightedSequence:
    """An image and its answered prompts, or what is left of them; all tensors (T,) but two.

    `branch_T` of a token is the prompt that it belongs to, PREFIX for tokens that all prompts read.
    `weight_T` is 1 for tokens that are kept and 0 for dropped ones. `tokens_KD` are the projected visual
    tokens of the placeholders among `ids_T`, and `predicts_A` the places whose next tokens are predicted.
    """

    ids_T: Tensor
    positions_T: Tensor
    branch_T: Tensor
    weight_T: Tensor
    tokens_KD: Tensor
    predicts_A: Tensor

    def bias(self) -> Tensor:
        """The additive mask (T, T): the prefix and the own prompt up to each token, with log weights.

        A token always attends to itself, which changes nothing if no other token attends to it.
        """
        itself_TT = torch.eye(len(self.ids_T), dtype=torch.bool, device=self.ids_T.device)
        other_TT = (self.branch_T != PREFIX) & (self.branch_T != self.branch_T[:, None])
        hidden_TT = other_TT | torch.ones_like(itself_TT).triu(1)
        bias_T = (DROPPED_WEIGHT + (1 - DROPPED_WEIGHT) * self.weight_T).log()
        lowest = torch.finfo(bias_T.dtype).min
        return bias_T.expand_as(hidden_TT).masked_fill(hidden_TT, lowest).masked_fill(itself_TT, 0.0)


def log_probabilities(model: Any, sequences: Sequence[WeightedSequence]) -> Tensor:
    """Log probabilities (A, V) of the predicted tokens of all sequences, one sequence after another."""
    starts = torch.tensor([0, *(len(sequence.ids_T) for sequence in sequences)]).cumsum(0).tolist()
    predicts = [part.predicts_A + start for part, start in zip(sequences, starts[:-1], strict=True)]
    images = BaseModelOutputWithPooling(pooler_output=[part.tokens_KD for part in sequences])
    with _weighted(model):
        logits_1AV = model(
            input_ids=torch.cat([part.ids_T for part in sequences])[None],
            position_ids=torch.cat([part.positions_T for part in sequences])[None],
            mm_encoder_outputs={"image": images},
            use_cache=False,
            logits_to_keep=torch.cat(predicts),
            segment_biases=[part.bias() for part in sequences],
        ).logits
    log_probabilities_AV: Tensor = logits_1AV[0].float().log_softmax(-1)
    return log_probabilities_AV


@contextmanager
def _weighted(model: Any) -> Iterator[None]:
    """The context in which the language model's attention is `_attend`."""
    config = model.config.get_text_config()
    before = config._attn_implementation
    config._attn_implementation = _NAME
    try:
        yield
    finally:
        config._attn_implementation = before


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float,
    segment_biases: Sequence[Tensor],
    **_: Any,
) -> tuple[Tensor, None]:
    """Softmax attention over (1, H, S, d) within segments of S, each with its bias (T, T); (1, S, H, d).

    Plain operations, as the fused kernels either give a mask no gradient or compute in float32.
    """
    lengths = [len(bias_TT) for bias_TT in segment_biases]
    groups = query.shape[1] // key.shape[1]
    query = (query * scaling).to(value.dtype)
    key, value = (part.repeat_interleave(groups, 1) if groups > 1 else part for part in (key, value))
    parts = (part[0].split(lengths, dim=1) for part in (query, key.to(value.dtype), value))
    mixed = []
    for query_HTd, key_HTd, value_HTd, bias_TT in zip(*parts, segment_biases, strict=True):
        weights_HTT = (query_HTd @ key_HTd.transpose(1, 2) + bias_TT).softmax(-1).to(value.dtype)
        mixed.append(weights_HTT @ value_HTd)
    return torch.cat(mixed, dim=1).transpose(0, 1)[None], None


AttentionInterface.register(_NAME, _attend)
