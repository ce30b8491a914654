"""Digest of a selector among the model arguments, so that lmms-eval's cache never returns stale answers.

lmms-eval looks up cached answers (`--use_cache`) by the model arguments alone. A selector retrained in
the same folder would get the answers of the former one, so with a cache the arguments must contain its
digest.
"""

import hashlib
import inspect
import json

from safetensors.torch import save

from atr.reduction import FeatureSelector

DIGEST_DIGITS = 16


def digest_selector(selector: FeatureSelector) -> str:
    """Hash of a selector's weights and config.json.

    The prefix keeps lmms-eval from parsing it as a number.
    """
    content = hashlib.sha256(save({name: value.cpu() for name, value in selector.state_dict().items()}))
    content.update(json.dumps(selector._hub_mixin_config, sort_keys=True, default=str).encode())
    return f"sha256-{content.hexdigest()[:DIGEST_DIGITS]}"


def check_selector_digest(given: str | None, selector: FeatureSelector) -> None:
    """Raise ValueError if the digest is another selector's, or missing while lmms-eval caches answers."""
    expected = digest_selector(selector)
    if given is None and is_cache_enabled():
        raise ValueError(
            "selector_digest: is missing, needed with lmms-eval's cache, which identifies a selector "
            f"by its path alone: selector_digest={expected}"
        )
    if given not in (None, expected):
        raise ValueError(f"selector_digest: {given!r} is another selector's, this one has {expected}")


def is_cache_enabled() -> bool:
    """Whether lmms-eval caches answers; read from its stack frame, as it does not tell the model."""
    callers = (frame.frame for frame in inspect.stack(context=0) if frame.function == "simple_evaluate")
    return any(caller.f_locals.get("use_cache") is not None for caller in callers)
