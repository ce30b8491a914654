"""Visual tokens that leave between the layers of the language model: FastV and PyramidDrop.

Forward pre-hooks, an interface of torch, shorten the hidden states that a decoder layer is given. From there
on the sequence is shorter, and so is the cache of each layer: time and memory are saved, in prefill and in
decoding. Masks come from transformers' `create_causal_mask`, which takes a layer's index where caches differ
in length (in transformers >= 5.18). Nothing of the model is replaced, and the hooks go with the context.

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
from atr.vlm.families import Tiling
from atr.vlm.policy import POSITIONS, Policy
from atr.vlm.reduce import Kept, Prepared, Reduced
from atr.vlm.tiling import TileLayout

LANGUAGE_MODELS = ("llama", "mistral", "qwen2")
"""Their attention projects by `q_proj` and `k_proj` and rotates both by Llama's `apply_rotary_pos_emb`."""


@dataclass(frozen=True)
class Slots:
    """Which columns of the full sequences lie in the slots of the shorter, left-padded ones.

    A slot of padding, one that is not real, holds a column as well, of a token that has left.
    """

    column_BS: Tensor
    real_BS: Tensor

    def narrow(self, stay_BL: Tensor) -> tuple[Tensor, "Slots"]:
        """The fewer slots of the columns that stay, and in which of these slots each of them was, (B, S)."""
        stay_BS = stay_BL.gather(1, self.column_BS) & self.real_BS
        longest = int(stay_BS.sum(1).max())
        order_BS = stay_BS.byte().sort(dim=1, stable=True).indices  # what stays comes last
        source_BS = order_BS[:, order_BS.shape[1] - longest :]
        return source_BS, Slots(self.column_BS.gather(1, source_BS), stay_BS.gather(1, source_BS))


class Inside:
    """A prepared input, `whole`, of which the hooks of `drop_inside` shorten every pass by `schedule`.

    `kept` says, by the layer before which tokens left, what the last prefill kept of each image, in the order
    of the placeholders.
    """

    def __init__(self, prepared: Prepared, schedule: Schedule, policy: Policy) -> None:
        self.whole: Reduced = prepared.reduce(Full(), Policy(1.0))
        self.kept: dict[int, tuple[Kept, ...]] = {}
        self._language_model = prepared.model.model.language_model
        self.schedule = schedule
        self._policy, self._packing = policy, _shown(prepared)
        self._real_BL: Tensor = self.whole["attention_mask"].bool()
        placeholder_BL = self.whole["input_ids"] == prepared.model.config.image_token_id
        self._places = placeholder_BL.nonzero().split(self._packing.lengths)
        column_BL = torch.arange(self._real_BL.shape[1], device=self._real_BL.device).expand_as(self._real_BL)
        self._slots = self._full = Slots(column_BL, self._real_BL)
        self._stages: dict[int, Slots] = {}
        self._cached = 0
        self._changes: dict[str, Any] = {}
        self._scores_BL: Tensor

    @property
    def tokens(self) -> list[float]:
        """Visual tokens of each image that a layer reads on average, in the order of the placeholders."""
        return [self.schedule.mean(size) for size in self._packing.sizes]

    @property
    def fed(self) -> list[float]:
        """The same with newlines, by the last prefill."""
        layers = range(self.schedule.layers)
        return [sum(counts) / len(layers) for counts in zip(*map(self._read_by, layers), strict=True)]

    def _read_by(self, layer: int) -> list[int]:
        """Tokens of each image, newlines among them, that a layer reads in the prefill."""
        passed = [drop for drop in self.kept if drop <= layer]
        return [len(kept.indices_K) for kept in self.kept[max(passed)]] if passed else self._packing.lengths

    def start(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Pre-hook of the language model: a pass without cached tokens is a prefill, any other decodes.

        Raises ValueError for a pass that is neither of the whole input, nor of one more token each.
        """
        cache, fed = kwargs.get("past_key_values"), tuple(kwargs["inputs_embeds"].shape[:2])
        if cache is not None and cache.is_compileable:
            raise ValueError(f"past_key_values: {type(cache).__name__} is not allowed, only one that grows")
        self._cached = cache.get_seq_length() if cache is not None else 0
        allowed = (len(self._real_BL), 1) if self._cached else tuple(self._real_BL.shape)
        if fed != allowed:
            raise ValueError(
                f"input_ids: {fed} are fed, allowed: {allowed}, the whole input and then, beside a cache, "
                "one token each; no beams"
            )
        self._slots, self._changes = self._full, {}

    def enter(
        self, index: int, layer: Any, args: tuple[Tensor], kwargs: dict[str, Any]
    ) -> tuple[tuple[Tensor], dict[str, Any]]:
        """Pre-hook of decoder layer `index`: gives it what it was given, of the tokens that are left."""
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
                # Read by flash attention alone, which would take the gaps for borders of packed sequences.
                "position_ids": None,
            }
        if prefills and not schedule.own and index + 1 in schedule.drops:
            self._rank(layer, hidden_BSD, kwargs)
        return (hidden_BSD,), kwargs | self._changes

    def _rank(self, layer: Any, hidden_BSD: Tensor, kwargs: Mapping[str, Any]) -> None:
        """Score the columns of the full sequences: -inf for padding, and for those that have left."""
        real_BS = self._slots.real_BS
        scores_BS = attention_of_last(layer, hidden_BSD, self._rotations(hidden_BSD, kwargs), real_BS)
        check_finite(scores_BS, f"layer {layer.self_attn.layer_idx}: attention")
        gone_BL = scores_BS.new_full(self._real_BL.shape, -torch.inf)
        scores_BS = scores_BS.masked_fill(~real_BS, -torch.inf)
        self._scores_BL = gone_BL.scatter(1, self._slots.column_BS, scores_BS)

    def _drop(self, index: int, hidden_BSD: Tensor) -> Tensor:
        """The hidden states of the tokens that stay from this layer on."""
        self.kept[index] = self._choose(index)
        stay_BL = torch.ones_like(self._real_BL)
        for place_P2, kept in zip(self._places, self.kept[index], strict=True):
            gone_P = torch.ones(len(place_P2), dtype=torch.bool)
            gone_P[kept.indices_K] = False
            stay_BL[tuple(place_P2[gone_P.to(place_P2.device)].T)] = False
        source_BS, self._stages[index] = self._slots.narrow(stay_BL)
        return tokens.gather(hidden_BSD, source_BS)

    def _choose(self, index: int) -> tuple[Kept, ...]:
        """What is left of each image from a layer on, by the scores."""
        groups, sizes = self._packing.groups(self._policy.budget), self._packing.sizes
        kept = [
            _best(self._scores_BL[tuple(place_P2.T)].cpu(), parts, self.schedule.count(index, size))
            for place_P2, parts, size in zip(self._places, groups, sizes, strict=True)
        ]
        stay = self._packing.with_newlines(kept, self._policy.newline)
        return tuple(
            Kept(len(kept_K), size, len(stay_K) - len(kept_K), stay_K)
            for kept_K, stay_K, size in zip(kept, stay, sizes, strict=True)
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
        """Position embeddings of the tokens that are left, from those that the full pass gives a layer."""
        cos_BLD, sin_BLD = kwargs["position_embeddings"]
        if self._policy.positions == "contiguous":
            # Counted back from the last token, which moved up by as many as have left.
            gone_B1 = self._real_BL.sum(1, keepdim=True) - self._slots.real_BS.sum(1, keepdim=True)
            back_S = torch.arange(hidden_BSD.shape[1] - 1, -1, -1, device=hidden_BSD.device)
            position_BS = (kwargs["position_ids"][:, -1:] - gone_B1 - back_S).clamp(min=0)
            rotations: tuple[Tensor, Tensor] = self._language_model.rotary_emb(hidden_BSD, position_BS)
            return rotations
        if self._cached:
            return cos_BLD, sin_BLD
        return tokens.gather(cos_BLD, self._slots.column_BS), tokens.gather(sin_BLD, self._slots.column_BS)


@contextmanager
def drop_inside(
    prepared: Prepared,
    reducer: LayerReducer,
    keep: float,
    positions: str = POSITIONS,
    budget: str = "image",
    newline: str = "keep",
) -> Iterator[Inside]:
    """Let visual tokens leave between the layers of the language model, while the context lasts.

        with drop_inside(prepare(model, inputs), FastV(), keep=0.5) as inside:
            answers = model.generate(**inside.whole, max_new_tokens=32)

    A token keeps its "original" position, or those that are left are numbered anew ("contiguous"). `budget`
    and `newline` are as in `atr.vlm.reduce.reduce`. Logits of a plain call are those of the last layer's
    tokens. Every prefill ranks anew, so that without a cache only a single pass is possible.

    Raises ValueError for a language model without support here, `keep` out of range, and unknown choices;
    inside the context for any input but `whole`, for beams and for a cache of fixed size.
    """
    policy = Policy(1.0, positions, budget, newline)
    language_model = prepared.model.model.language_model
    _check(language_model.config)
    schedule = reducer.schedule(language_model.config.num_hidden_layers, keep)
    inside = Inside(prepared, schedule, policy)
    with ExitStack() as hooks:
        hooks.enter_context(language_model.register_forward_pre_hook(inside.start, with_kwargs=True))
        for index, layer in enumerate(language_model.layers):
            hook = partial(inside.enter, index)
            hooks.enter_context(layer.register_forward_pre_hook(hook, with_kwargs=True))
        yield inside


def attention_of_last(
    layer: Any, hidden_BSD: Tensor, rotations: tuple[Tensor, Tensor], real_BS: Tensor
) -> Tensor:
    """Attention that a decoder layer's last token would pay to each, mean over heads; float32 (B, S).

    `hidden_BSD` is what the layer is given. Of the attention matrix only this row is computed.
    """
    attention, normed_BSD = layer.self_attn, layer.input_layernorm(hidden_BSD)
    query_BHSD = _heads(attention.q_proj(normed_BSD[:, -1:]), attention.head_dim)
    key_BGSD = _heads(attention.k_proj(normed_BSD), attention.head_dim)
    # The one query is rotated to every position; its own is the last.
    query_BHSD, key_BGSD = apply_rotary_pos_emb(query_BHSD, key_BGSD, *rotations)
    heads_BGHD = query_BHSD[:, :, -1].reshape(*key_BGSD.shape[:2], -1, attention.head_dim)
    logits_BGHS = (heads_BGHD @ key_BGSD.transpose(2, 3)).float() * attention.scaling
    logits_BGHS = logits_BGHS.masked_fill(~real_BS[:, None, None], -torch.inf)
    scores_BS: Tensor = logits_BGHS.softmax(-1).mean((1, 2))
    return scores_BS


def _heads(states_BSD: Tensor, width: int) -> Tensor:
    return states_BSD.view(*states_BSD.shape[:2], -1, width).transpose(1, 2)


def _best(scores_P: Tensor, parts: Sequence[Tensor], count: int) -> Tensor:
    """Of an image's tokens that are left the best, in raster order; its parts share by what each has left."""
    left = [part[scores_P[part] > -torch.inf] for part in parts]
    counts = shares(count, [len(part) for part in left])
    best = [part[top_k_BK(scores_P[part], some)] for part, some in zip(left, counts, strict=True)]
    return torch.cat(best).sort().values


def _shown(prepared: Prepared) -> TileLayout:
    """The packing of the images as often as they are shown, in the order of the placeholders."""
    packing, tiling = prepared.packing, prepared.packing.tiling
    sizes = tiling.sizes and [tiling.sizes[image] for image in prepared.image_of]
    tiles = tuple(tiling.tiles[image] for image in prepared.image_of)
    return TileLayout(packing.model, Tiling(tiles, tiling.grid, sizes), packing.resample)


def _check(config: Any) -> None:
    if config.model_type not in LANGUAGE_MODELS:
        allowed = ", ".join(LANGUAGE_MODELS)
        raise ValueError(f"language model: {config.model_type} is not supported, allowed: {allowed}")
    if window := getattr(config, "sliding_window", None):
        raise ValueError(f"language model: sliding_window {window} is not supported, allowed: None")
