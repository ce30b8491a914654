"""The arguments of `atr_llava`, as they arrive from a command line, checked before anything is loaded."""

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
"""Types of the weights by name; None is the one that the checkpoint was saved in."""


@dataclass(frozen=True)
class Arguments:
    """A LLaVA, a selector, and what `atr.vlm.reduce.reduce` is told; its meaning and defaults there.

    `pretrained` and `selector` are folders or hub ids. `keep` is as it is written: 1.0 is a fraction and
    means all tokens, 1 is a count and means one. `device` is by default the one that accelerate chooses.
    `selector_digest` is that of `atr.integrations.lmms_eval.selector_digest`.
    Raises ValueError naming key, value and what is allowed.
    """

    pretrained: str
    selector: str
    keep: float | str
    positions: str = POSITIONS
    budget: str = "image"
    newline: str = "keep"
    interpolation: str = "model"
    dtype: str = "auto"
    attn_implementation: str = "sdpa"
    device: str | None = None
    batch_size: int = 1
    selector_digest: str | None = None

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Self:
        """The arguments among `given`, all of which must be known and none missing that has no default."""
        known = {field.name: field.default is MISSING for field in fields(cls)}
        if unknown := sorted(set(given) - set(known)):
            raise ValueError(f"{unknown[0]}: {given[unknown[0]]!r} is unknown, allowed: {', '.join(known)}")
        if missing := [name for name, needed in known.items() if needed and name not in given]:
            raise ValueError(f"{missing[0]}: is missing, needed: {', '.join(n for n in known if known[n])}")
        size = str(given.get("batch_size", 1))  # lmms-eval hands it on as text
        if not size.isdecimal() or int(size) == 0:
            raise ValueError(f"batch_size: {size!r} is not allowed, allowed: a whole number from 1 up")
        return cls(**{**given, "batch_size": int(size)})

    def __post_init__(self) -> None:
        for key in ("pretrained", "selector"):
            if not isinstance(getattr(self, key), str) or not getattr(self, key):
                raise ValueError(f"{key}: {getattr(self, key)!r} is not allowed, allowed: a folder or hub id")
        _ = self.policy
        check_choice("interpolation", self.interpolation)
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: {self.dtype!r} is unknown, allowed: {', '.join(DTYPES)}")
        if self.positions == "original" and "flash" in self.attn_implementation:
            raise ValueError(
                f"positions: original is not safe under {self.attn_implementation}, allowed: contiguous"
            )
        if self.device is not None:
            _check_device(self.device)

    @property
    def policy(self) -> Policy:
        """How many tokens stay, and how."""
        return Policy(self.keep, self.positions, self.budget, self.newline)


def _check_device(name: str) -> None:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device: {name!r} is unknown, allowed: cpu, cuda, cuda:0 and so on") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise ValueError(f"device: {name!r} is not there, allowed: cpu, or one of {found} CUDA devices")
