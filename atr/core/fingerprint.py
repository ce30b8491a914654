"""Which vision tower features come from, in a few digits that survive tuning and rounding of its weights."""

import re
from typing import Any

import torch

BITS = 256
MAX_DIFFERING_BITS = BITS // 4
"""Bits in which a tower may differ from itself, tuned with a language model or rounded to another type.

Two towers that were trained apart differ in half of them, 128 with a deviation of 8: the micro tower and
DINOv2-small in 135. DINOv2-small and itself with noise of a tenth of its weights' deviation differ in 12.
"""
_HEX = re.compile(rf"[0-9a-f]{{1,{BITS // 4}}}")
_STRIDE = 2654435761  # odd and large: successive places lie in different filters and at different pixels


def fingerprint(tower: Any) -> str | None:
    """The signs of 256 weights in the patch embedding of a transformers tower, as hex digits.

    None where the weights are not in memory: offloaded, they are left on the meta device.
    """
    kernel = next(weight for weight in tower.get_input_embeddings().parameters() if weight.ndim == 4)
    if kernel.is_meta:
        return None
    places = torch.arange(BITS, device=kernel.device) * _STRIDE % kernel.numel()
    positive = (kernel.detach().flatten()[places] > 0).tolist()
    return f"{int(''.join('01'[bit] for bit in positive), 2):0{BITS // 4}x}"


def check_fingerprint(known: object) -> None:
    """Raise ValueError unless it is a fingerprint, or None for one that is not known."""
    if known is not None and not (isinstance(known, str) and _HEX.fullmatch(known)):
        raise ValueError(f"fingerprint: {known!r:.80} is not allowed, allowed: up to {BITS // 4} hex digits")


def is_same_tower(one: str, other: str) -> bool:
    """Whether two fingerprints are of one tower."""
    return (int(one, 16) ^ int(other, 16)).bit_count() <= MAX_DIFFERING_BITS
