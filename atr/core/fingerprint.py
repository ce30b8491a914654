"""Fingerprint of a vision tower: a few hex digits that survive fine-tuning and rounding of its weights."""

import re
from typing import Any

import torch
from torch import Tensor, nn

BITS = 256
MAX_DIFFERING_BITS = BITS // 4
"""Bits in which two fingerprints of one tower may differ after fine-tuning or rounding to another dtype.

Two towers trained independently differ in half of the bits (128, standard deviation 8): the micro tower and
DINOv2-small in 135. DINOv2-small and a copy with noise of a tenth of its weights' deviation differ in 12.
"""
_HEX = re.compile(rf"[0-9a-f]{{1,{BITS // 4}}}")
_STRIDE = 2654435761  # odd and large: successive places lie in different filters and at different pixels


def fingerprint(tower: Any) -> str | None:
    """The signs of 256 weights in the patch embedding of a transformers tower, as hex digits.

    None if the weights are not in memory (offloaded to the meta device).
    """
    kernel = _patch_kernel(tower)
    if kernel.is_meta:
        return None
    places = torch.arange(BITS, device=kernel.device) * _STRIDE % kernel.numel()
    positive = (kernel.detach().flatten()[places] > 0).tolist()
    return f"{int(''.join('01'[bit] for bit in positive), 2):0{BITS // 4}x}"


def _patch_kernel(tower: Any) -> Tensor:
    """Weights by which a tower embeds pixels: a convolution, or a linear layer of flattened patches."""
    layers = nn.Conv2d, nn.Conv3d, nn.Linear
    # Every tower of transformers registers its modules in the order in which it runs them.
    weight: Tensor = next(module for module in tower.modules() if isinstance(module, layers)).weight
    return weight


def check_fingerprint(known: object) -> None:
    """Raise ValueError unless `known` is a fingerprint, or None for an unknown tower."""
    if known is not None and not (isinstance(known, str) and _HEX.fullmatch(known)):
        raise ValueError(f"fingerprint: {known!r:.80} is not allowed, allowed: up to {BITS // 4} hex digits")


def is_same_tower(one: str, other: str) -> bool:
    """Whether two fingerprints belong to the same tower."""
    return (int(one, 16) ^ int(other, 16)).bit_count() <= MAX_DIFFERING_BITS
