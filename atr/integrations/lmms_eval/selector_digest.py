"""Answers that lmms-eval keeps (`--use_cache`) are found again by the model's arguments alone.

A selector that was trained anew in the same folder would be given the answers of the one before: where
answers are kept, the arguments have to hold a digest of it.
"""

import hashlib
import inspect
import json

from safetensors.torch import save

from atr.reduction import FeatureSelector

DIGEST_DIGITS = 16


def digest_selector(selector: FeatureSelector) -> str:
    """Hash of all that a selector's choices depend on: its weights and its config.json.

    Its prefix keeps lmms-eval from reading it as a number.
    """
    content = hashlib.sha256(save({name: value.cpu() for name, value in selector.state_dict().items()}))
    content.update(json.dumps(selector._hub_mixin_config, sort_keys=True, default=str).encode())
    return f"sha256-{content.hexdigest()[:DIGEST_DIGITS]}"


def check_selector_digest(given: str | None, selector: FeatureSelector) -> None:
    """Raise ValueError for the digest of another selector, and for none where lmms-eval keeps answers."""
    own = digest_selector(selector)
    if given is None and is_cache_enabled():
        raise ValueError(
            "selector_digest: is missing, needed with lmms-eval's cache, which knows a selector by its path "
            f"alone: selector_digest={own}"
        )
    if given not in (None, own):
        raise ValueError(f"selector_digest: {given!r} is of another selector, this one is {own}")


def is_cache_enabled() -> bool:
    """Whether the evaluation that a model is being made for keeps answers, which lmms-eval tells no model."""
    callers = (frame.frame for frame in inspect.stack(context=0) if frame.function == "simple_evaluate")
    return any(caller.f_locals.get("use_cache") is not None for caller in callers)
