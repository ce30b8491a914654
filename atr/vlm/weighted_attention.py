"""Passes over packed sequences whose tokens have weights in attention, with gradients to the weights.

The sequences of a batch stand one after another in a single row, without padding, and attention takes them
one by one. Shapes: T tokens of a sequence, S tokens of all sequences, A predicted tokens of all, V words of
the vocabulary, H heads, d channels of a head.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface

from atr.vlm.image_tokens import ImageTokens
from atr.vlm.prefix import ALL_BRANCHES

DROPPED_WEIGHT = 1e-3
"""Attention weight left to a dropped token; at zero it would get no gradient."""
_NAME = "atr_weighted"
_MULTIPLE = 64
"""Rows of the packed tokens: oneDNN compiles a kernel for each new number, and keeps about a thousand."""


@dataclass(frozen=True)
class WeightedSequence:
    """An image and its answered prompts, or what is left of them; all tensors (T,) but a few.

    `positions_T` are (T,), or (axes, T) for models with several axes. `branch_T` of a token is the prompt
    that it belongs to, ALL_BRANCHES for tokens that all prompts read. `weight_T` is 1 for kept tokens and 0
    for dropped ones. `tokens_KD` are the visual tokens of the placeholders among `ids_T` as the model reads
    them, `levels` and `carried` the further features of `ImageTokens`, and `predicts_A` the places whose next
    tokens are predicted.
    """

    ids_T: Tensor
    positions_T: Tensor
    branch_T: Tensor
    weight_T: Tensor
    tokens_KD: Tensor
    predicts_A: Tensor
    levels: Sequence[Tensor] = ()
    carried: Mapping[str, Any] = field(default_factory=dict)
    token_types: Mapping[str, Tensor] = field(default_factory=dict)

    def bias(self) -> Tensor:
        """The additive mask (T, T): the prefix and the own prompt up to each token, with log weights.

        A token always attends to itself, which changes nothing if no other token attends to it.
        """
        itself_TT = torch.eye(len(self.ids_T), dtype=torch.bool, device=self.ids_T.device)
        other_TT = (self.branch_T != ALL_BRANCHES) & (self.branch_T != self.branch_T[:, None])
        hidden_TT = other_TT | torch.ones_like(itself_TT).triu(1)
        bias_T = (DROPPED_WEIGHT + (1 - DROPPED_WEIGHT) * self.weight_T).log()
        lowest = torch.finfo(bias_T.dtype).min
        return bias_T.expand_as(hidden_TT).masked_fill(hidden_TT, lowest).masked_fill(itself_TT, 0.0)


def log_probabilities(model: Any, sequences: Sequence[WeightedSequence]) -> Tensor:
    """Log probabilities (A, V) of the predicted tokens of all sequences, one sequence after another."""
    starts = torch.tensor([0, *(len(part.ids_T) for part in sequences)]).cumsum(0).tolist()
    predicts = [part.predicts_A + start for part, start in zip(sequences, starts[:-1], strict=True)]
    ids_S, predicts_A = torch.cat([part.ids_T for part in sequences]), torch.cat(predicts)
    positions_S = torch.cat([part.positions_T for part in sequences], dim=-1)
    padding = -len(ids_S) % _MULTIPLE
    biases = [*(part.bias() for part in sequences), torch.zeros(padding, padding, device=ids_S.device)]
    with _weighted(model), _only(predicts_A, len(ids_S) + padding, model):
        logits_1AV = model(
            input_ids=torch.cat([ids_S, ids_S[-1:].expand(padding)])[None],
            position_ids=functional.pad(positions_S, (0, padding)).unsqueeze(-2),
            mm_encoder_outputs=_images(sequences),
            use_cache=False,
            logits_to_keep=predicts_A,
            segment_biases=biases,
            **_token_types(sequences, padding),
        ).logits
    log_probabilities_AV: Tensor = logits_1AV[0].float().log_softmax(-1)
    return log_probabilities_AV


def _images(sequences: Sequence[WeightedSequence]) -> dict[str, Any]:
    """The visual tokens of all sequences."""
    levels = zip(*(part.levels for part in sequences), strict=True)
    images = ImageTokens(
        [part.tokens_KD for part in sequences], [list(level) for level in levels], sequences[0].carried
    )
    return images.keep([torch.arange(len(tokens_KD)) for tokens_KD in images.images])


def _token_types(sequences: Sequence[WeightedSequence], padding: int) -> dict[str, Tensor]:
    """The token types of all sequences and of the padding, which is text."""
    return {
        name: functional.pad(torch.cat([part.token_types[name] for part in sequences]), (0, padding))[None]
        for name in sequences[0].token_types
    }


@contextmanager
def _weighted(model: Any) -> Iterator[None]:
    """The context in which the language model's attention is `_attend`."""
    parts = [model, *model.get_decoder().modules()]
    configs = {id(part.config): part.config.get_text_config() for part in parts if hasattr(part, "config")}
    before = [(config, config._attn_implementation) for config in configs.values()]
    try:
        for config, _ in before:
            config._attn_implementation = _NAME
        yield
    finally:
        for config, kernel in before:
            config._attn_implementation = kernel


@contextmanager
def _only(places_A: Tensor, length: int, model: Any) -> Iterator[None]:
    """The context in which the last feed-forward net computes these places alone, as no others are read.

    Only if it is one of linear layers: others, such as experts, are computed whole.
    """
    last: Any = getattr(model.get_decoder().layers[-1], "mlp", None)
    if not _is_linear(last):
        yield
        return

    def spread(_: Any, __: Any, output_1AD: Tensor) -> Tensor:
        return output_1AD.new_zeros(1, length, output_1AD.shape[-1]).index_copy(1, places_A, output_1AD)

    hooks = [
        last.register_forward_pre_hook(lambda _, given: (given[0][:, places_A],)),
        last.register_forward_hook(spread),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _is_linear(part: Any) -> bool:
    """Whether a module has no parameters but those of linear layers, and one input."""
    if part is None or len(signature(type(part).forward).parameters) != 2:
        return False
    owners = [module for module in part.modules() if any(True for _ in module.parameters(recurse=False))]
    return all(isinstance(module, nn.Linear) for module in owners)


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float | None,
    segment_biases: Sequence[Tensor],
    **_: Any,
) -> tuple[Tensor, None]:
    """Softmax attention over (1, H, S, d) within segments of S, each with its bias (T, T); (1, S, H, d).

    Plain operations, as the fused kernels either give a mask no gradient or compute in float32.
    """
    lengths = [len(bias_TT) for bias_TT in segment_biases]
    groups = query.shape[1] // key.shape[1]
    query = (query * (scaling or query.shape[-1] ** -0.5)).to(value.dtype)
    key, value = (part.repeat_interleave(groups, 1) if groups > 1 else part for part in (key, value))
    parts = (torch.split(part[0], lengths, dim=1) for part in (query, key.to(value.dtype), value))
    mixed = []
    for query_HTd, key_HTd, value_HTd, bias_TT in zip(*parts, segment_biases, strict=True):
        weights_HTT = (query_HTd @ key_HTd.transpose(1, 2) + bias_TT).softmax(-1).to(value.dtype)
        mixed.append(weights_HTT @ value_HTd)
    return torch.cat(mixed, dim=1).transpose(0, 1)[None], None


AttentionInterface.register(_NAME, _attend)
