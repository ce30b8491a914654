"""Attention and keys of a vision tower whose patches are merged into fewer tokens, one value per token.

Towers such as Qwen-VL's read the patches of all images as one sequence and give no attention weights; here
they are computed from the queries and keys that a layer hands to its attention function. Shapes: see
atr.core.tokens; T patches of the tower with its special tokens, H heads, C channels, Q queries.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from atr.core.ragged import Grid
from atr.core.tower_layer import TowerLayer
from atr.features.attention_hooks import Call, check_capturable, record_calls, tower_layer
from atr.features.merged import raster_places, vision_tower

PATCH_ORDER = {
    "aya_vision": "raster",
    "cohere2_vision": "raster",
    "ernie4_5_vl_moe": "blocks",
    "exaone4_5": "windows",
    "gemma3": "raster",
    "gemma4": "raster",
    "glm46v": "blocks",
    "glm4v": "blocks",
    "glm_ocr": "blocks",
    "hyperclovax_vision_v2": "windows",
    "idefics3": "raster",
    "internvl": "raster",
    "kimi_k25": "raster",
    "lfm2_vl": "raster",
    "lighton_ocr": "raster",
    "minicpmv4_6": "raster",
    "mistral3": "raster",
    "ovis2": "raster",
    "paddleocr_vl": "raster",
    "paligemma": "raster",
    "qwen2_5_vl": "windows",
    "qwen2_vl": "blocks",
    "qwen3_5": "blocks",
    "qwen3_5_moe": "blocks",
    "qwen3_vl": "blocks",
    "qwen3_vl_moe": "blocks",
    "smolvlm": "raster",
    "vipllava": "raster",
}
"""The order of the patches in the tower, by model type: the raster of each tile; or merge blocks, a token
each, in the raster of the tokens or by windows."""
_ENTRIES = 2**20
"""Attention weights that are computed at once: 4 MiB."""


@contextmanager
def capture_merged_attention(
    model: Any, layer: TowerLayer | None, grids: Sequence[Grid], needs: Collection[str]
) -> Iterator[dict[str, list[Tensor]]]:
    """Observe one `get_image_features` in the block; after the block the dict holds the signals in `needs`.

    Each signal is a tensor for each tile of `grids`, (rows, columns) in tokens and in the order of the
    placeholders; its N tokens are in raster order, and a token's value is the mean over its patches.

    - "attention_BN": float32 (N,), the attention that a patch receives, averaged over heads and over the
      queries that see it; from the class token alone if there is one. A tower with layers that attend in
      windows gives it in the last layer up to the one that is read which attends to whole images, or, if
      there is none, in the first such layer;
    - "keys_BND": (N, C), the keys as the layer projects them, before rotary positions, averaged over heads;
    - "first_attention_BN": like "attention_BN", in the first layer that attends to whole images.

    The layer is the one whose output is `hidden_states[layer]` of the tower, and for "merged" and None the
    one whose output is merged. The forward is unchanged: the attention of these layers is computed a second
    time, in parts, so that no matrix of all patches is held. Raises ValueError for a need that is not in
    CAPTURABLE, a model type that is not in PATCH_ORDER, a layer without attention, and images packed for
    FlashAttention.
    """
    _check(model, needs)
    signals: dict[str, list[Tensor]] = {}
    if not needs:
        yield signals
        return
    tower = vision_tower(model)
    modules = {need: _attention_module(model, tower, layer, need) for need in needs}
    with record_calls(modules) as calls:
        yield signals
    for need, module in modules.items():
        hidden_BTD = _hidden_states(calls[need])
        merged = _Merge.of(tower, PATCH_ORDER[model.config.model_type], hidden_BTD, grids)
        if need == "keys_BND":
            signals[need] = merged.tokens(_mean_keys(module, hidden_BTD))
        else:
            patches_BT1 = _received(tower, module, calls[need], merged.special)[..., None]
            signals[need] = [values_N1[:, 0] for values_N1 in merged.tokens(patches_BT1)]


def mean_received(
    query_BHTC: Tensor, key_BHTC: Tensor, mask: Tensor | None, scaling: float, queries: int | None = None
) -> Tensor:
    """Attention that each key receives, averaged over heads and over the queries that see it; float32 (B, T).

    Softmax of scaled products as in eager attention, a part of the queries at a time. `mask` says which keys
    a query sees, in boolean or as what is added to the products, and broadcasts to (B, 1, T, T); (B, T) says
    it for all queries. A query that does not see itself is padding and does not count. `queries` limits the
    mean to the first ones.
    """
    batch, heads, tokens = query_BHTC.shape[:3]
    if heads > key_BHTC.shape[1]:
        key_BHTC = key_BHTC.repeat_interleave(heads // key_BHTC.shape[1], dim=1)
    key_BHCT = key_BHTC.float().mT
    seen_BTT = _seen(mask, tokens, query_BHTC.device)
    real_BT = seen_BTT.diagonal(dim1=1, dim2=2)
    total_BT = torch.zeros(batch, tokens, device=query_BHTC.device)
    count_BT = torch.zeros_like(total_BT)
    rows = torch.arange(tokens if queries is None else queries, device=query_BHTC.device)
    for row_Q in torch.split(rows, max(1, _ENTRIES // (batch * heads * tokens))):
        seen_BQT, real_BQ1 = seen_BTT[:, row_Q], real_BT[:, row_Q, None]
        logits_BHQT = (query_BHTC[:, :, row_Q].float() * scaling) @ key_BHCT
        if mask is not None:
            logits_BHQT.masked_fill_(~seen_BQT[:, None], torch.finfo(torch.float32).min)
        total_BT += (logits_BHQT.softmax(-1).mean(1) * real_BQ1).sum(1)
        count_BT += (seen_BQT & real_BQ1).sum(1)
    return total_BT / count_BT.clamp_min(1)


def _seen(mask: Tensor | None, tokens: int, device: torch.device) -> Tensor:
    """Which keys each query sees, (B or 1, T, T), without memory of that size where no mask is given."""
    if mask is None:
        return torch.ones((), dtype=torch.bool, device=device).expand(1, tokens, tokens)
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    seen = seen[:, None, None] if seen.ndim == 2 else seen
    return seen.expand(-1, -1, tokens, tokens)[:, 0]


@dataclass(frozen=True)
class _Recorder:
    """Takes the place of a layer's attention function and keeps what each key received, call by call."""

    queries: int | None
    received: list[Tensor] = field(default_factory=list)

    def __call__(self, query_BHTC: Tensor, key_BHTC: Tensor, mask: Tensor | None, scaling: float) -> None:
        self.received.append(mean_received(query_BHTC, key_BHTC, mask, scaling, self.queries))


_recorder: ContextVar[_Recorder] = ContextVar("recorder")


def _record(
    module: nn.Module,
    query_BHTC: Tensor,
    key_BHTC: Tensor,
    value_BHTC: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **options: Any,
) -> tuple[Tensor, None]:
    """An attention function for transformers that records, and returns what nobody reads."""
    if "cu_seq_lens_q" in options:
        raise ValueError("attention cannot be computed from images packed for FlashAttention, allowed: sdpa")
    _recorder.get()(query_BHTC, key_BHTC, attention_mask, scaling)
    return value_BHTC.transpose(1, 2), None


_RECORDING = "atr_received"
AttentionInterface.register(_RECORDING, _record)


def _received(tower: Any, module: Any, call: Call, special: int) -> Tensor:
    """Attention that each patch and special token received in the recorded call of a layer; (B, T)."""
    args, kwargs = call
    recorder = _Recorder(special or None)
    implementation, token = tower.config._attn_implementation, _recorder.set(recorder)
    tower.set_attn_implementation(_RECORDING)
    try:
        module(*args, **kwargs)
    finally:
        tower.set_attn_implementation(implementation)
        _recorder.reset(token)
    return torch.cat(recorder.received, dim=1)  # one call for all images, or one for each


def _mean_keys(module: Any, hidden_BTD: Tensor) -> Tensor:
    """Each patch's key, averaged over heads; (B, T, C)."""
    is_fused = hasattr(module, "qkv")
    keys_BTD = module.qkv(hidden_BTD).chunk(3, dim=-1)[1] if is_fused else module.k_proj(hidden_BTD)
    keys_BTC: Tensor = keys_BTD.unflatten(-1, (-1, module.head_dim)).mean(-2)
    return keys_BTC


@dataclass(frozen=True)
class _Merge:
    """How a tower's patches, after `special` tokens of each row, become tokens of `side` x `side` patches."""

    tower: Any
    order: str
    grids: Sequence[Grid]
    side: int
    special: int

    @classmethod
    def of(cls, tower: Any, order: str, hidden_BTD: Tensor, grids: Sequence[Grid]) -> "_Merge":
        """That of a layer's input: a row for each tile, padded to the longest, or one row for all of them."""
        counts = [rows * columns for rows, columns in grids]
        tokens = max(counts) if len(hidden_BTD) == len(grids) else sum(counts)
        side = isqrt(hidden_BTD.shape[1] // tokens)
        return cls(tower, order, grids, side, hidden_BTD.shape[1] - tokens * side**2)

    def tokens(self, values_BTC: Tensor) -> list[Tensor]:
        """The mean over the patches of each token, (N, C) for each tile, tokens in raster order."""
        side, values_BPC = self.side, values_BTC[:, self.special :]
        counts = [rows * columns * side**2 for rows, columns in self.grids]
        is_packed = len(values_BPC) < len(self.grids)
        parts = torch.split(values_BPC[0], counts) if is_packed else values_BPC
        tiles = [part_PC[:count] for part_PC, count in zip(parts, counts, strict=True)]
        if self.order == "raster":
            return [
                tile_PC.reshape(rows, side, columns, side, -1).mean((1, 3)).flatten(0, 1)
                for tile_PC, (rows, columns) in zip(tiles, self.grids, strict=True)
            ]
        means = [tile_PC.reshape(-1, side**2, tile_PC.shape[1]).mean(1) for tile_PC in tiles]
        if self.order == "blocks":
            return means
        return [means_NC[places_N] for means_NC, places_N in zip(means, self._places(), strict=True)]

    def _places(self) -> list[Tensor]:
        """Where the tokens of each tile, in raster order, are among its windows; int64 (N,)."""
        patches = [torch.tensor([[1, rows * self.side, columns * self.side]]) for rows, columns in self.grids]
        return [raster_places(self.tower.config, grid_13, self.side) for grid_13 in patches]


def _hidden_states(call: Call) -> Tensor:
    """The input of an attention module as rows of patches, (B, T, D)."""
    args, kwargs = call
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden if hidden.ndim == 3 else hidden[None]


def _attention_module(model: Any, tower: Any, layer: TowerLayer | None, need: str) -> Any:
    """The attention module of the layer in which a need is captured."""
    depth = tower.config.num_hidden_layers
    whole = sorted(getattr(tower.config, "fullatt_block_indexes", range(depth)))
    read = _block(model, depth, layer)
    index = {
        "keys_BND": read,
        "first_attention_BN": whole[0],
        "attention_BN": max((block for block in whole if block <= read), default=whole[0]),
    }[need]
    modules = tower_layer(tower, index + 1).modules()
    return next(module for module in modules if hasattr(module, "qkv") or hasattr(module, "k_proj"))


def _block(model: Any, depth: int, layer: TowerLayer | None) -> int:
    """Index of the block whose output is `hidden_states[layer]`."""
    if not isinstance(layer, int):
        names = ("vision_feature_layer", "vision_feature_layers")
        own = next((getattr(model.config, name) for name in names if hasattr(model.config, name)), -1)
        layer = own if isinstance(own, int) else max(own, key=lambda one: one % (depth + 1))
    index = layer - 1 if layer >= 0 else depth + layer
    if not 0 <= index < depth:
        raise ValueError(
            f"layer: {layer} of the tower of {model.config.model_type} has no attention, "
            f"allowed: 1 to {depth}, -{depth} to -1"
        )
    return index


def _check(model: Any, needs: Collection[str]) -> None:
    check_capturable(needs)
    kind = model.config.model_type
    if needs and kind not in PATCH_ORDER:
        allowed = ", ".join(PATCH_ORDER)
        raise ValueError(f"{min(needs)} is not available from the tower of {kind}, allowed: {allowed}")
