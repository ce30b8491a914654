"""Whether removing a token is the same function as masking it: found from the language model's configuration.

Attention over all earlier tokens with position ids does not see a removed token, as it does not see a masked
one. Recurrent layers and short convolutions mix neighbours by their place in the sequence, and a sliding
window counts the tokens that are there.
"""

import warnings
from typing import Any

_ATTENTION = frozenset(
    {"full_attention", "sliding_attention", "chunked_attention", "attention", "dense", "sparse"}
)
"""Kinds of layers that see other tokens by attention alone."""
_WINDOWS = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
_SAID: set[str] = set()


def why_not_exact(model: Any, length: int) -> str:
    """Why removing tokens from a prompt of `length` tokens differs from masking them; empty if not."""
    text = model.config.get_text_config()
    kinds = list(getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or [])
    if others := sorted(set(kinds) - _ATTENTION):
        count = sum(kind in others for kind in kinds)
        return f"{count} of its {len(kinds)} layers are {' and '.join(others)}, which mix neighbouring tokens"
    for kind, name in _WINDOWS.items():
        window = getattr(text, name, None)
        if isinstance(window, int) and window < length and (kind in kinds or not kinds):
            return f"its {name} of {window} is shorter than the prompt of {length} tokens"
    return ""


def warn_if_inexact(model: Any, length: int) -> None:
    """Warn, once per process and model type, where removing tokens is another function than masking them."""
    model_type = model.config.model_type
    if model_type not in _SAID and (reason := why_not_exact(model, length)):
        _SAID.add(model_type)
        warnings.warn(
            f"model type {model_type}: removing tokens is not the same as masking them, because {reason}",
            stacklevel=3,
        )
