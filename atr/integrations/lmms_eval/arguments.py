"""The model arguments of `atr`, checked before anything is loaded."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, Self

import torch

from atr.vlm.policy import POSITIONS, Policy, check_choice

DTYPES = {
    "auto": None,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
"""Dtypes of the weights by name; None means the checkpoint's."""


@dataclass(frozen=True)
class Arguments:
    """A model, a selector, and the options of `atr.vlm.reduce.reduce`, which explains them.

    `pretrained` and `selector` are folders or hub ids. `keep` is a fraction if written as a float (1.0 keeps
    all tokens), a count if written as an int (1 keeps one), or "adaptive"; then `bounds` are the lowest and
    the highest, written as low:high. `system_prompt`, `min_pixels`, `max_pixels`, `max_patches` and
    `enable_thinking` take the place of the values that lmms-eval's own class has for the model's family
    (`atr.integrations.lmms_eval.prompts`). `device` defaults to accelerate's choice; `selector_digest` is
    described in `atr.integrations.lmms_eval.selector_digest`.
    Raises ValueError naming key, value and what is allowed.
    """

    pretrained: str
    selector: str
    keep: float | str
    positions: str = POSITIONS
    budget: str = "image"
    newline: str = "keep"
    bounds: tuple[float, float] = (0.0, 1.0)
    interpolation: str = "model"
    system_prompt: str | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    max_patches: int | None = None
    enable_thinking: bool | None = None
    dtype: str = "auto"
    attn_implementation: str = "sdpa"
    device: str | None = None
    batch_size: int = 1
    selector_digest: str | None = None

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Self:
        """Arguments from keywords; raises ValueError for an unknown key or a missing one without default."""
        known = [field.name for field in fields(cls)]
        required = [field.name for field in fields(cls) if field.default is MISSING]
        if unknown := sorted(set(given) - set(known)):
            raise ValueError(f"{unknown[0]}: {given[unknown[0]]!r} is unknown, allowed: {', '.join(known)}")
        if missing := [name for name in required if name not in given]:
            raise ValueError(f"{missing[0]}: is missing, needed: {', '.join(required)}")
        size = str(given.get("batch_size", 1))  # lmms-eval passes text
        if not size.isdecimal() or int(size) == 0:
            raise ValueError(f"batch_size: {size!r} is not allowed, allowed: an integer >= 1")
        parsed = {"bounds": _parse_bounds(given["bounds"])} if "bounds" in given else {}
        return cls(**{**given, **parsed, "batch_size": int(size)})

    def __post_init__(self) -> None:
        for key in ("pretrained", "selector"):
            if not isinstance(getattr(self, key), str) or not getattr(self, key):
                raise ValueError(f"{key}: {getattr(self, key)!r} is not allowed, allowed: a folder or hub id")
        _ = self.policy  # checks its arguments
        check_choice("interpolation", self.interpolation)
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: {self.dtype!r} is unknown, allowed: {', '.join(DTYPES)}")
        if self.positions == "original" and "flash" in self.attn_implementation:
            raise ValueError(
                f"positions: original is not safe under {self.attn_implementation}, allowed: contiguous"
            )
        if self.device is not None:
            _check_device(self.device)
        for key in ("min_pixels", "max_pixels", "max_patches"):
            value = getattr(self, key)
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"{key}: {value!r} is not allowed, allowed: an integer >= 1")
        if not isinstance(self.enable_thinking, bool | None):
            raise ValueError(f"enable_thinking: {self.enable_thinking!r} is unknown, allowed: True, False")
        if not isinstance(self.system_prompt, str | None):
            raise ValueError(f"system_prompt: {self.system_prompt!r} is not allowed, allowed: a text")

    @property
    def policy(self) -> Policy:
        """The token budget and how it is applied."""
        return Policy(self.keep, self.positions, self.budget, self.newline, self.bounds)


def _parse_bounds(given: Any) -> Any:
    """Two bounds from the text low:high, as lmms-eval's arguments have no pairs; others stay."""
    if not isinstance(given, str):
        return given
    try:
        low, high = (int(part) if part.isdecimal() else float(part) for part in given.split(":"))
    except ValueError as error:
        raise ValueError(
            f"bounds: {given!r} is not allowed, allowed: low:high, two fractions or counts, such as 0.1:0.5"
        ) from error
    return low, high


def _check_device(name: str) -> None:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device: {name!r} is unknown, allowed: cpu, cuda, cuda:0 and so on") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ValueError(f"device: {name!r} does not exist, allowed: cpu, or one of {count} CUDA devices")
