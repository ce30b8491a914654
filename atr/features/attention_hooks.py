"""Attention and keys of one layer of a vision tower, captured beside its features where a reducer asks.

Shapes: B images, T tokens of the tower, N patch tokens, D width of the tower, H heads, C channels of a head.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_Call = tuple[tuple[Any, ...], dict[str, Any]]
CAPTURABLE = ("attention_BN", "keys_BND", "first_attention_BN")
_FIRST = 1  # as `hidden_states` counts layers

# Tokens that stand for the whole image, by type of tower; they come first, register tokens after them.
CLASS_TOKENS = {
    "clip_vision_model": 1,
    "siglip_vision_model": 0,  # SigLIP 2 as well, in its checkpoints of one resolution
    "vit": 1,
    "dinov2": 1,
    "dinov2_with_registers": 1,
    "dinov3_vit": 1,
}


def leading_tokens(config: Any) -> tuple[int, int]:
    """Of a tower in CLASS_TOKENS, by its configuration: tokens of the whole image, and tokens before patches.

    A class token stands for nothing where the configuration says `untrained_class_token`: no loss has ever
    read it, as in a tower that was trained from nothing behind a projector of the patches alone.
    """
    class_tokens = CLASS_TOKENS[config.model_type]
    extra_tokens = class_tokens + getattr(config, "num_register_tokens", 0)
    return 0 if getattr(config, "untrained_class_token", False) else class_tokens, extra_tokens


@contextmanager
def capture_attention(
    tower: Any, layer: int, class_tokens: int, extra_tokens: int, needs: Collection[str]
) -> Iterator[dict[str, Tensor]]:
    """Within the block, one forward of `tower` is watched; at its end the dict holds what `needs` names.

    - "attention_BN", float32: the mean over heads of the class token's attention to each patch, or where no
      token stands for the whole image, the mean over all patches as well (the column mean of the matrix);
    - "keys_BND": the mean over heads of the patches' keys, as the layer projects them; here D is C;
    - "first_attention_BN": as "attention_BN", of the tower's first layer.

    The others are of the layer whose output is `hidden_states[layer]`. The forward itself is left as it is:
    these layers' attention alone is computed a second time, eagerly, as the fused kernels give no weights. So
    the features do not depend on what is asked for. Raises ValueError for a need that is not in FIELDS.
    """
    if unknown := sorted(set(needs) - set(CAPTURABLE)):
        raise ValueError(f"{unknown[0]} cannot be captured, allowed: {', '.join(CAPTURABLE)}")
    seen: dict[str, Tensor] = {}
    if not needs:
        yield seen
        return
    watched = {need: _attention(tower, _FIRST if need == "first_attention_BN" else layer) for need in needs}
    with _called(watched) as calls:
        yield seen
    for need, attention in watched.items():
        if need == "keys_BND":
            seen[need] = _keys(tower, attention, calls[need])[:, extra_tokens:]
        else:
            queries = slice(0, 1) if class_tokens else slice(extra_tokens, None)
            seen[need] = _attended(tower, attention, calls[need], queries)[:, extra_tokens:]


@contextmanager
def _called(watched: dict[str, Any]) -> Iterator[dict[str, _Call]]:
    """Arguments that each module is called with in the block, once; there at its end."""
    seen: list[tuple[str, _Call]] = []
    watches = [
        module.register_forward_hook(
            lambda module, args, kwargs, output, need=need: seen.append((need, (args, kwargs))),
            with_kwargs=True,
        )
        for need, module in watched.items()
    ]
    calls: dict[str, _Call] = {}
    try:
        yield calls
    finally:
        for watch in watches:
            watch.remove()
    assert len(seen) == len(watched), f"{len(seen)} calls of {len(watched)} layers, allowed: one forward"
    calls.update(seen)


def _attended(tower: Any, attention: Any, call: _Call, queries: slice) -> Tensor:
    """Attention that each token receives from the queries, its mean over them and the heads; (B, T)."""
    args, kwargs = call
    with _eager(tower):
        weights_BHTT: Tensor = attention(*args, **kwargs)[1]
    return weights_BHTT[:, :, queries].mean((1, 2), dtype=torch.float32)


def _keys(tower: Any, attention: Any, call: _Call) -> Tensor:
    """Each token's key, its mean over heads; (B, T, C)."""
    args, kwargs = call
    hidden_BTD = args[0] if args else kwargs["hidden_states"]
    keys_BTHC: Tensor = attention.k_proj(hidden_BTD).unflatten(-1, (tower.config.num_attention_heads, -1))
    return keys_BTHC.mean(2)


def _attention(tower: Any, layer: int) -> Any:
    """The attention module of the layer that `hidden_states[layer]` comes out of."""
    depth = tower.config.num_hidden_layers
    stacks = (module for module in tower.modules() if isinstance(module, nn.ModuleList))
    layers = next(stack for stack in stacks if len(stack) == depth)
    index = layer - 1 if layer > 0 else depth + layer
    return next(module for module in layers[index].modules() if hasattr(module, "k_proj"))


@contextmanager
def _eager(tower: Any) -> Iterator[None]:
    implementation = tower.config._attn_implementation
    tower.set_attn_implementation("eager")
    try:
        yield
    finally:
        tower.set_attn_implementation(implementation)
