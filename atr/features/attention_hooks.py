"""Captures the attention and keys of a vision tower's layer during its forward, for reducers that need them.

Shapes: see atr.core.tokens; T tokens of the tower, H heads, C channels of a head.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and named arguments of a module's forward."""
CAPTURABLE = ("attention_BN", "keys_BND", "first_attention_BN")
"""Signals that `capture_attention` can give."""
_FIRST_LAYER = 1  # as an index into `hidden_states`

# Number of class tokens by type of tower, or the configuration's field for it; they come first.
CLASS_TOKENS: dict[str, int | str] = {
    "clip_vision_model": 1,
    "siglip_vision_model": 0,  # SigLIP 2 as well, in its checkpoints of one resolution
    "vit": 1,
    "dinov2": 1,
    "dinov2_with_registers": 1,
    "dinov3_vit": 1,
    "aimv2_vision_model": 0,
    "beit": 1,
    "chinese_clip_vision_model": 1,
    "deit": 1,
    "ijepa": 0,
    "internvl_vision": 1,
    "mlcd_vision_model": 1,
    "pixio": "n_cls_tokens",
    "radio": "num_cls_tokens",
    "sapiens2": 1,
    "tipsv2_vision_model": 1,
    "vit_msn": 1,
}
# Tokens between class tokens and patches, where not the configuration's `num_register_tokens`.
_REGISTERS: dict[str, int | str] = {
    "deit": 1,  # the distillation token
    "radio": "num_registers",
}


def leading_tokens(config: Any) -> tuple[int, int]:
    """Numbers of class tokens and of all tokens before the patches, for a tower type in CLASS_TOKENS.

    The class tokens do not count if the configuration has `untrained_class_token`: no loss ever read them, as
    in a tower trained from scratch through a projector that reads only the patches.
    """
    class_tokens = _count(config, CLASS_TOKENS[config.model_type])
    extra_tokens = class_tokens + _count(config, _REGISTERS.get(config.model_type, "num_register_tokens"))
    return 0 if getattr(config, "untrained_class_token", False) else class_tokens, extra_tokens


def _count(config: Any, tokens: int | str) -> int:
    return tokens if isinstance(tokens, int) else int(getattr(config, tokens, 0))


def layers_to_run(model: str, layer: int, depth: int) -> int:
    """Number of layers to run to get `layer` of `depth`; ValueError naming `model` if there is none."""
    if layer == 0 or not -depth <= layer <= depth:
        raise ValueError(f"{model}: there is no layer {layer}, allowed: 1 to {depth}, or -{depth} to -1")
    return int(layer if layer > 0 else depth + 1 + layer)


def check_capturable(needs: Collection[str]) -> None:
    """Raise ValueError for a need that is not in CAPTURABLE."""
    if unknown := sorted(set(needs) - set(CAPTURABLE)):
        raise ValueError(f"{unknown[0]} cannot be captured, allowed: {', '.join(CAPTURABLE)}")


@contextmanager
def capture_attention(
    tower: Any, layer: int, class_tokens: int, extra_tokens: int, needs: Collection[str]
) -> Iterator[dict[str, Tensor]]:
    """Observe one forward of `tower` in the block; after the block the dict holds the signals in `needs`.

    - "attention_BN", float32: the first class token's attention to each patch, averaged over heads; without
      class tokens the attention of all patches, averaged over them too (the column mean of the matrix);
    - "keys_BND": the patches' keys as the layer projects them, averaged over heads; their width D is C;
    - "first_attention_BN": like "attention_BN", in the tower's first layer.

    The first two come from the layer whose output is `hidden_states[layer]`. The forward is unchanged, so the
    features do not depend on `needs`: the attention of these layers is computed a second time, eagerly, as
    fused kernels return no weights. Raises ValueError for a need that is not in CAPTURABLE.
    """
    check_capturable(needs)
    signals: dict[str, Tensor] = {}
    if not needs:
        yield signals
        return
    modules = {
        need: _attention_module(tower, _FIRST_LAYER if need == "first_attention_BN" else layer)
        for need in needs
    }
    with record_calls(modules) as calls:
        yield signals
    for need, module in modules.items():
        if need == "keys_BND":
            signals[need] = _mean_keys(tower, module, calls[need])[:, extra_tokens:]
        else:
            queries = slice(0, 1) if class_tokens else slice(extra_tokens, None)
            signals[need] = _received_attention(tower, module, calls[need], queries)[:, extra_tokens:]


@contextmanager
def record_calls(modules: Mapping[str, Any]) -> Iterator[dict[str, Call]]:
    """Record the arguments of each module's one call in the block; the dict is filled after the block."""
    recorded: list[tuple[str, Call]] = []
    calls: dict[str, Call] = {}
    with ExitStack() as hooks:
        for need, module in modules.items():
            hook = partial(_keep_call, recorded, need)
            hooks.enter_context(module.register_forward_hook(hook, with_kwargs=True))
        yield calls
    assert len(recorded) == len(modules), f"{len(recorded)} calls of {len(modules)} layers, not one forward"
    calls.update(recorded)


def _keep_call(
    recorded: list[tuple[str, Call]], need: str, module: Any, args: Any, kwargs: Any, output: Any
) -> None:
    recorded.append((need, (args, kwargs)))


def _received_attention(tower: Any, module: Any, call: Call, queries: slice) -> Tensor:
    """Attention that each token receives, averaged over the queries and heads; (B, T)."""
    args, kwargs = call
    with _eager(tower):
        weights_BHTT: Tensor = module(*args, **kwargs)[1]
    return weights_BHTT[:, :, queries].mean((1, 2), dtype=torch.float32)


def _mean_keys(tower: Any, module: Any, call: Call) -> Tensor:
    """Each token's key, averaged over heads; (B, T, C)."""
    args, kwargs = call
    hidden_BTD = args[0] if args else kwargs["hidden_states"]
    # Grouped attention has fewer heads of keys than of queries.
    channels = module.q_proj.out_features // tower.config.num_attention_heads
    keys_BTHC: Tensor = module.k_proj(hidden_BTD).unflatten(-1, (-1, channels))
    return keys_BTHC.mean(2)


def _attention_module(tower: Any, layer: int) -> Any:
    """The attention module of the layer whose output is `hidden_states[layer]`."""
    return next(module for module in tower_layer(tower, layer).modules() if hasattr(module, "k_proj"))


def tower_layer(tower: Any, layer: int) -> nn.Module:
    """The module of a tower whose output is `hidden_states[layer]`; `layer` is not 0."""
    depth = tower.config.num_hidden_layers
    stacks = (module for module in tower.modules() if isinstance(module, nn.ModuleList))
    layers = next(stack for stack in stacks if len(stack) == depth)
    return layers[layer - 1 if layer > 0 else depth + layer]


@contextmanager
def _eager(tower: Any) -> Iterator[None]:
    implementation = tower.config._attn_implementation
    tower.set_attn_implementation("eager")
    try:
        yield
    finally:
        tower.set_attn_implementation(implementation)
