"""Prune visual tokens between the decoder layers of the language model, as FastV and PyramidDrop do.

Forward pre-hooks of torch shorten the hidden states at the input of a decoder layer. From that layer on the
sequence and the key-value cache are shorter, which saves time and memory in prefill and decoding. Causal
masks come from transformers' `create_causal_mask`, which takes a layer index for caches of different lengths
(transformers >= 5.18). No module of the model is replaced; the hooks are removed with the context.

Shapes: B rows, L tokens of the full sequences, S of the shorter ones, P packed tokens of an image.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.masking_utils import create_causal_mask
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from atr.core import tokens
from atr.core.finite import check_finite
from atr.core.tokens import shares, top_k_BK
from atr.reduction import Full
from atr.reduction.layer_schedule import LayerReducer, Schedule
from atr.vlm.families import OWN_TYPES, family_of
from atr.vlm.families.rule import Rule
from atr.vlm.policy import POSITIONS, Policy
from atr.vlm.reduce import Kept, Prepared, Reduced
from atr.vlm.tiling import TileLayout

LANGUAGE_MODELS = ("llama", "mistral", "qwen2")
"""Language models whose attention has `q_proj` and `k_proj` and Llama's rotary position embedding."""


@dataclass(frozen=True)
class Slots:
    """The columns of the full sequences that the shorter, left-padded sequences hold.

    A padding slot (`real_BS` is false) holds the column of a pruned token.
    """

    column_BS: Tensor
    real_BS: Tensor

    def narrow(self, stay_BL: Tensor) -> tuple[Tensor, "Slots"]:
        """Keep the columns of `stay_BL`; int64 (B, S) indices into the present slots, and the new slots."""
        stay_BS = stay_BL.gather(1, self.column_BS) & self.real_BS
        longest = int(stay_BS.sum(1).max())
        order_BS = stay_BS.byte().sort(dim=1, stable=True).indices  # the remaining columns come last
        source_BS = order_BS[:, order_BS.shape[1] - longest :]
        return source_BS, Slots(self.column_BS.gather(1, source_BS), stay_BS.gather(1, source_BS))


class LayerPruning:
    """The state of `prune_layers`: the full `inputs` and what each pass over them keeps.

    `kept` maps each layer of the schedule's drops to the tokens that the last prefill kept of each image, in
    the order of the placeholders.
    """

    def __init__(self, prepared: Prepared, schedule: Schedule, policy: Policy) -> None:
        self.inputs: Reduced = prepared.reduce(Full(), Policy(1.0))
        self.kept: dict[int, tuple[Kept, ...]] = {}
        self._language_model = prepared.model.model.language_model
        self.schedule = schedule
        self._policy, self._layout = policy, _shown_layout(prepared)
        self._real_BL: Tensor = self.inputs["attention_mask"].bool()
        placeholder_BL = self.inputs["input_ids"] == prepared.model.config.image_token_id
        self._places = placeholder_BL.nonzero().split(self._layout.lengths)
        column_BL = torch.arange(self._real_BL.shape[1], device=self._real_BL.device).expand_as(self._real_BL)
        self._slots = self._full = Slots(column_BL, self._real_BL)
        self._stages: dict[int, Slots] = {}
        self._cached = 0
        self._changes: dict[str, Any] = {}
        self._scores_BL: Tensor

    @property
    def tokens(self) -> list[float]:
        """Visual tokens of each image, mean over the layers, in the order of the placeholders."""
        return [self.schedule.mean(size) for size in self._layout.sizes]

    @property
    def fed(self) -> list[float]:
        """Visual tokens and newlines of each image in the last prefill, mean over the layers."""
        layers = range(self.schedule.layers)
        return [sum(counts) / len(layers) for counts in zip(*map(self._count_read, layers), strict=True)]

    def _count_read(self, layer: int) -> list[int]:
        """Count the visual tokens and newlines of each image that a layer reads in the prefill."""
        passed = [drop for drop in self.kept if drop <= layer]
        return [len(kept.indices_K) for kept in self.kept[max(passed)]] if passed else self._layout.lengths

    def start(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Pre-hook of the language model: without cached tokens the pass is a prefill, otherwise it decodes.

        Raises ValueError for a cache of fixed size, a prefill of anything but `inputs`, and a decoding step
        of more than one token per row.
        """
        cache, fed = kwargs.get("past_key_values"), tuple(kwargs["inputs_embeds"].shape[:2])
        if cache is not None and cache.is_compileable:
            raise ValueError(
                f"past_key_values: {type(cache).__name__} is not allowed, allowed: a cache that grows"
            )
        self._cached = cache.get_seq_length() if cache is not None else 0
        allowed = (len(self._real_BL), 1) if self._cached else tuple(self._real_BL.shape)
        if fed != allowed:
            raise ValueError(
                f"input_ids: shape {fed} is not allowed, allowed: {allowed}, the whole input and then, with "
                "a cache, one token per row; no beams"
            )
        self._slots, self._changes = self._full, {}

    def enter(
        self, index: int, layer: Any, args: tuple[Tensor], kwargs: dict[str, Any]
    ) -> tuple[tuple[Tensor], dict[str, Any]]:
        """Pre-hook of decoder layer `index`: restrict its input to the remaining tokens."""
        hidden_BSD, prefills, schedule = args[0], not self._cached, self.schedule
        if prefills and schedule.own and index in schedule.drops:
            self._rank(layer, hidden_BSD, kwargs)
        if index in schedule.drops:
            if prefills:
                hidden_BSD = self._drop(index, hidden_BSD)
            self._slots = self._stages[index]
            self._changes = {
                "attention_mask": self._causal_mask(index, hidden_BSD, kwargs["past_key_values"]),
                "position_embeddings": self._rotations(hidden_BSD, kwargs),
                # Only FlashAttention reads them, and it takes gaps for the borders of packed sequences.
                "position_ids": None,
            }
        if prefills and not schedule.own and index + 1 in schedule.drops:
            self._rank(layer, hidden_BSD, kwargs)
        return (hidden_BSD,), kwargs | self._changes

    def _rank(self, layer: Any, hidden_BSD: Tensor, kwargs: Mapping[str, Any]) -> None:
        """Score the columns of the full sequences by attention; -inf for padding and pruned tokens."""
        real_BS = self._slots.real_BS
        scores_BS = last_token_attention(layer, hidden_BSD, self._rotations(hidden_BSD, kwargs), real_BS)
        check_finite(scores_BS, f"layer {layer.self_attn.layer_idx}: attention")
        pruned_BL = scores_BS.new_full(self._real_BL.shape, -torch.inf)
        scores_BS = scores_BS.masked_fill(~real_BS, -torch.inf)
        self._scores_BL = pruned_BL.scatter(1, self._slots.column_BS, scores_BS)

    def _drop(self, index: int, hidden_BSD: Tensor) -> Tensor:
        """Prune before layer `index`: the hidden states of the tokens that remain."""
        self.kept[index] = self._choose(index)
        stay_BL = torch.ones_like(self._real_BL)
        for place_P2, kept in zip(self._places, self.kept[index], strict=True):
            pruned_P = torch.ones(len(place_P2), dtype=torch.bool)
            pruned_P[kept.indices_K] = False
            stay_BL[tuple(place_P2[pruned_P.to(place_P2.device)].T)] = False
        source_BS, self._stages[index] = self._slots.narrow(stay_BL)
        return tokens.gather(hidden_BSD, source_BS)

    def _choose(self, index: int) -> tuple[Kept, ...]:
        """Choose the tokens of each image that remain from layer `index` on, by the scores."""
        groups, sizes = self._layout.groups(self._policy.budget), self._layout.sizes
        kept = [
            _select_best(self._scores_BL[tuple(place_P2.T)].cpu(), parts, self.schedule.count(index, size))
            for place_P2, parts, size in zip(self._places, groups, sizes, strict=True)
        ]
        stay = self._layout.with_newlines(kept, self._policy.newline)
        return tuple(
            Kept(len(kept_K), size, len(stay_K) - len(kept_K), stay_K, tiles)
            for kept_K, stay_K, size, tiles in zip(kept, stay, sizes, self._layout.grids, strict=True)
        )

    def _causal_mask(self, index: int, hidden_BSD: Tensor, cache: Any) -> Any:
        generated = max(self._cached + 1 - self._real_BL.shape[1], 0)
        return create_causal_mask(
            config=self._language_model.config,
            inputs_embeds=hidden_BSD,
            attention_mask=F.pad(self._slots.real_BS, (0, generated), value=True),
            past_key_values=cache,
            layer_idx=index,
        )

    def _rotations(self, hidden_BSD: Tensor, kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Rotary position embeddings of the remaining tokens, from those of the full sequences."""
        cos_BLD, sin_BLD = kwargs["position_embeddings"]
        if self._policy.positions == "contiguous":
            # Counted back from the last token, which moved up by the number of pruned tokens.
            pruned_B1 = self._real_BL.sum(1, keepdim=True) - self._slots.real_BS.sum(1, keepdim=True)
            back_S = torch.arange(hidden_BSD.shape[1] - 1, -1, -1, device=hidden_BSD.device)
            position_BS = (kwargs["position_ids"][:, -1:] - pruned_B1 - back_S).clamp(min=0)
            rotations: tuple[Tensor, Tensor] = self._language_model.rotary_emb(hidden_BSD, position_BS)
            return rotations
        if self._cached:
            return cos_BLD, sin_BLD
        return tokens.gather(cos_BLD, self._slots.column_BS), tokens.gather(sin_BLD, self._slots.column_BS)


@contextmanager
def prune_layers(
    prepared: Prepared,
    reducer: LayerReducer,
    keep: float,
    positions: str = POSITIONS,
    budget: str = "image",
    newline: str = "keep",
) -> Iterator[LayerPruning]:
    """Prune visual tokens between the layers of the language model within a context.

        with prune_layers(prepare(model, inputs), FastV(), keep=0.5) as pruning:
            answers = model.generate(**pruning.inputs, max_new_tokens=32)

    With `positions="original"` tokens keep their positions; with "contiguous" the remaining tokens are
    renumbered. `budget` and `newline` are those of `atr.vlm.reduce.reduce`. A forward call returns logits of
    the last layer's tokens. Each prefill ranks the tokens anew, so a call without a cache is a single pass.

    Raises ValueError for a family other than LLaVA's, an unsupported language model, `keep` out of range, and
    unknown choices; within the context, for inputs other than `pruning.inputs`, beams, and a cache of fixed
    size.
    """
    policy = Policy(1.0, positions, budget, newline)
    _check_family(prepared.model)
    language_model = prepared.model.model.language_model
    _check_language_model(language_model.config)
    schedule = reducer.schedule(language_model.config.num_hidden_layers, keep)
    pruning = LayerPruning(prepared, schedule, policy)
    with ExitStack() as hooks:
        hooks.enter_context(language_model.register_forward_pre_hook(pruning.start, with_kwargs=True))
        for index, layer in enumerate(language_model.layers):
            hook = partial(pruning.enter, index)
            hooks.enter_context(layer.register_forward_pre_hook(hook, with_kwargs=True))
        yield pruning


def last_token_attention(
    layer: Any, hidden_BSD: Tensor, rotations: tuple[Tensor, Tensor], real_BS: Tensor
) -> Tensor:
    """Attention of the last token to all tokens in a decoder layer, mean over heads; float32 (B, S).

    `hidden_BSD` is the layer's input. Only this row of the attention matrix is computed.
    """
    attention, normed_BSD = layer.self_attn, layer.input_layernorm(hidden_BSD)
    query_BHSD = _heads(attention.q_proj(normed_BSD[:, -1:]), attention.head_dim)
    key_BGSD = _heads(attention.k_proj(normed_BSD), attention.head_dim)
    # The single query is broadcast to every position; its own is the last.
    query_BHSD, key_BGSD = apply_rotary_pos_emb(query_BHSD, key_BGSD, *rotations)
    heads_BGHD = query_BHSD[:, :, -1].reshape(*key_BGSD.shape[:2], -1, attention.head_dim)
    logits_BGHS = (heads_BGHD @ key_BGSD.transpose(2, 3)).float() * attention.scaling
    logits_BGHS = logits_BGHS.masked_fill(~real_BS[:, None, None], -torch.inf)
    scores_BS: Tensor = logits_BGHS.softmax(-1).mean((1, 2))
    return scores_BS


def _heads(states_BSD: Tensor, width: int) -> Tensor:
    return states_BSD.view(*states_BSD.shape[:2], -1, width).transpose(1, 2)


def _select_best(scores_P: Tensor, parts: Sequence[Tensor], count: int) -> Tensor:
    """The `count` best remaining tokens, in raster order; `parts` share it by their remaining tokens."""
    left = [part[scores_P[part] > -torch.inf] for part in parts]
    counts = shares(count, [len(part) for part in left])
    best = [part[top_k_BK(scores_P[part], k)] for part, k in zip(left, counts, strict=True)]
    return torch.cat(best).sort().values


def _shown_layout(prepared: Prepared) -> TileLayout:
    """The layout of all shown images in the order of the placeholders, repeats included."""
    layout = prepared.layout
    return TileLayout(layout.model, layout.tiling.of(prepared.image_of), layout.resample)


def _check_family(model: Any) -> None:
    if isinstance(family_of(model), Rule):
        allowed = ", ".join(OWN_TYPES)
        raise ValueError(
            f"model type {model.config.model_type!r} is not supported between the layers of the language "
            f"model, allowed: {allowed}"
        )


def _check_language_model(config: Any) -> None:
    if config.model_type not in LANGUAGE_MODELS:
        allowed = ", ".join(LANGUAGE_MODELS)
        raise ValueError(f"language model: {config.model_type} is not supported, allowed: {allowed}")
    if window := getattr(config, "sliding_window", None):
        raise ValueError(f"language model: sliding_window {window} is not supported, allowed: None")
