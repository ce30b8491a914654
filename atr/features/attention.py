"""Attention and keys of one layer of a vision tower, captured beside its features where a reducer asks.

Shapes: B images, T tokens of the tower, N patch tokens, D width of the tower, H heads, C channels of a head.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

FIELDS = ("attention_BN", "keys_BND")


@contextmanager
def observing(
    tower: Any, layer: int, class_tokens: int, extra_tokens: int, needs: Collection[str]
) -> Iterator[dict[str, Tensor]]:
    """Within the block, one forward of `tower` is watched; at its end the dict holds what `needs` names.

    - "attention_BN", float32: the mean over heads of the class token's attention to each patch, or where the
      tower has no class token, the mean over all queries as well (the column mean of the matrix);
    - "keys_BND": the mean over heads of the patches' keys, as the layer projects them; here D is C.

    Both are of the layer whose output is `hidden_states[layer]`. The forward itself is left as it is: that
    layer's attention alone is computed a second time, eagerly, as the fused kernels give no weights. So the
    features do not depend on what is asked for. Raises ValueError for a need that is not in FIELDS.
    """
    if unknown := sorted(set(needs) - set(FIELDS)):
        raise ValueError(f"{unknown[0]} cannot be captured, allowed: {', '.join(FIELDS)}")
    seen: dict[str, Tensor] = {}
    if not needs:
        yield seen
        return
    attention, calls = _attention(tower, layer), []
    watch = attention.register_forward_hook(
        lambda module, args, kwargs, output: calls.append((args, kwargs)), with_kwargs=True
    )
    try:
        yield seen
    finally:
        watch.remove()
    assert len(calls) == 1, f"the tower ran {len(calls)} times within the block"
    args, kwargs = calls[0]
    if "attention_BN" in needs:
        with _eager(tower):
            weights_BHTT = attention(*args, **kwargs)[1]
        seen["attention_BN"] = _attention_to_patches(weights_BHTT, class_tokens, extra_tokens)
    if "keys_BND" in needs:
        hidden_BTD = args[0] if args else kwargs["hidden_states"]
        keys_BTHC = attention.k_proj(hidden_BTD).unflatten(-1, (tower.config.num_attention_heads, -1))
        seen["keys_BND"] = keys_BTHC.mean(2)[:, extra_tokens:]


def _attention_to_patches(weights_BHTT: Tensor, class_tokens: int, extra_tokens: int) -> Tensor:
    queries = slice(0, 1) if class_tokens else slice(None)
    attention_BT = weights_BHTT[:, :, queries].mean((1, 2), dtype=torch.float32)
    return attention_BT[:, extra_tokens:]


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
