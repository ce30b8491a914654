"""Captures the attention and keys of a vision tower's layer during its forward, for reducers that need them.

Shapes: see atr.core.tokens; T tokens of the tower, H heads, C channels of a head.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_Call = tuple[tuple[Any, ...], dict[str, Any]]
CAPTURABLE = ("attention_BN", "keys_BND", "first_attention_BN")
"""Signals that `capture_attention` can give."""
_FIRST_LAYER = 1  # as an index into `hidden_states`

# Number of class tokens by type of tower; they come first, followed by register tokens.
CLASS_TOKENS = {
    "clip_vision_model": 1,
    "siglip_vision_model": 0,  # SigLIP 2 as well, in its checkpoints of one resolution
    "vit": 1,
    "dinov2": 1,
    "dinov2_with_registers": 1,
    "dinov3_vit": 1,
}


def leading_tokens(config: Any) -> tuple[int, int]:
    """Numbers of class tokens and of all tokens before the patches, for a tower type in CLASS_TOKENS.

    The class token does not count if the configuration has `untrained_class_token`: no loss ever read it, as
    in a tower trained from scratch through a projector that reads only the patches.
    """
    class_tokens = CLASS_TOKENS[config.model_type]
    extra_tokens = class_tokens + getattr(config, "num_register_tokens", 0)
    return 0 if getattr(config, "untrained_class_token", False) else class_tokens, extra_tokens


@contextmanager
def capture_attention(
    tower: Any, layer: int, class_tokens: int, extra_tokens: int, needs: Collection[str]
) -> Iterator[dict[str, Tensor]]:
    """Observe one forward of `tower` in the block; after the block the dict holds the signals in `needs`.

    - "attention_BN", float32: the class token's attention to each patch, averaged over heads; without a class
      token the attention of all patches, averaged over them too (the column mean of the attention matrix);
    - "keys_BND": the patches' keys as the layer projects them, averaged over heads; their width D is C;
    - "first_attention_BN": like "attention_BN", in the tower's first layer.

    The first two come from the layer whose output is `hidden_states[layer]`. The forward is unchanged, so the
    features do not depend on `needs`: the attention of these layers is computed a second time, eagerly, as
    fused kernels return no weights. Raises ValueError for a need that is not in CAPTURABLE.
    """
    if unknown := sorted(set(needs) - set(CAPTURABLE)):
        raise ValueError(f"{unknown[0]} cannot be captured, allowed: {', '.join(CAPTURABLE)}")
    signals: dict[str, Tensor] = {}
    if not needs:
        yield signals
        return
    modules = {
        need: _attention_module(tower, _FIRST_LAYER if need == "first_attention_BN" else layer)
        for need in needs
    }
    with _record_calls(modules) as calls:
        yield signals
    for need, module in modules.items():
        if need == "keys_BND":
            signals[need] = _mean_keys(tower, module, calls[need])[:, extra_tokens:]
        else:
            queries = slice(0, 1) if class_tokens else slice(extra_tokens, None)
            signals[need] = _received_attention(tower, module, calls[need], queries)[:, extra_tokens:]


@contextmanager
def _record_calls(modules: dict[str, Any]) -> Iterator[dict[str, _Call]]:
    """Record the arguments of each module's one call in the block; the dict is filled after the block."""
    recorded: list[tuple[str, _Call]] = []
    hooks = [
        module.register_forward_hook(
            lambda module, args, kwargs, output, need=need: recorded.append((need, (args, kwargs))),
            with_kwargs=True,
        )
        for need, module in modules.items()
    ]
    calls: dict[str, _Call] = {}
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()
    assert len(recorded) == len(modules), f"{len(recorded)} calls of {len(modules)} layers, not one forward"
    calls.update(recorded)


def _received_attention(tower: Any, module: Any, call: _Call, queries: slice) -> Tensor:
    """Attention that each token receives, averaged over the queries and heads; (B, T)."""
    args, kwargs = call
    with _eager(tower):
        weights_BHTT: Tensor = module(*args, **kwargs)[1]
    return weights_BHTT[:, :, queries].mean((1, 2), dtype=torch.float32)


def _mean_keys(tower: Any, module: Any, call: _Call) -> Tensor:
    """Each token's key, averaged over heads; (B, T, C)."""
    args, kwargs = call
    hidden_BTD = args[0] if args else kwargs["hidden_states"]
    keys_BTHC: Tensor = module.k_proj(hidden_BTD).unflatten(-1, (tower.config.num_attention_heads, -1))
    return keys_BTHC.mean(2)


def _attention_module(tower: Any, layer: int) -> Any:
    """The attention module of the layer whose output is `hidden_states[layer]`."""
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
