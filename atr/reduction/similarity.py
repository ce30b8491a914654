"""Cosine similarity of tokens that does not depend on the batch, and the spaces it is computed in.

A matrix product rounds differently in batches of different size, which could change the choice between near
duplicates. Cosines are therefore computed in float64 and either rounded to float32 (`rounded_cosines_BNN`) or
computed from vectors rounded to a grid so coarse that their products are exact (`exact_cosines_BNN`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from atr.reduction.base import EncoderOutput

SPACES = ("features", "projected")
"""The encoder's features, and the same tokens after the projector of the language model."""

_UNIT = 2.0**26
_COSINE = 2.0**36
_ROWS = 256
"""Rows of cosines computed at once, from the diagonal on: the other half is equal."""


def rounded_cosines_BNN(features_BND: Tensor) -> Tensor:
    """Cosines of all pairs of tokens, float32 (B, N, N); equal for equal tokens, in any batch."""
    unit_BND = F.normalize(precise(features_BND), dim=2)
    return (unit_BND @ unit_BND.mT).float()


def exact_cosines_BNN(features_BND: Tensor) -> Tensor:
    """Cosines of all pairs of tokens, 0 with a token that is zero; float64 (B, N, N), symmetric.

    Equal for equal tokens, in any batch: the entries of the unit vectors are multiples of 2^-26, so that no
    partial sum of their products needs more than the bits of float64. The cosines are multiples of 2^-36, so
    that their sums over up to 2^16 tokens are exact too.
    """
    units_BND = grid_units(features_BND)
    images, tokens, _ = units_BND.shape
    if tokens <= _ROWS:
        return _round(units_BND @ units_BND.mT, _COSINE)
    cosines_BNN = units_BND.new_empty(images, tokens, tokens)
    for start in range(0, tokens, _ROWS):
        stop = start + _ROWS
        part = _round(units_BND[:, start:stop] @ units_BND[:, start:].mT, _COSINE)
        cosines_BNN[:, start:stop, start:] = part
        cosines_BNN[:, stop:, start:stop] = part[..., _ROWS:].mT
    return cosines_BNN


def grid_units(vectors: Tensor) -> Tensor:
    """Vectors (..., D) at unit length, 0 for a zero vector, rounded to multiples of 2^-26; float64."""
    tiny = torch.finfo(torch.float64).tiny
    return _round(F.normalize(vectors.double(), dim=-1, eps=tiny), _UNIT)


def to_grid(values: Tensor) -> Tensor:
    """Values rounded to multiples of 2^-26, float64."""
    return _round(values.to(torch.float64, copy=True), _UNIT)


def _round(values: Tensor, of_one: float) -> Tensor:
    """Round to multiples of 1 / of_one, a power of two, in place."""
    return values.mul_(of_one).round_().mul_(1 / of_one)


def precise(values: Tensor) -> Tensor:
    """Values in float64, or in float32 on Apple's GPUs, which have no float64."""
    return values.to(torch.float32 if values.device.type == "mps" else torch.float64)


def check_space(on: str) -> None:
    """Raise ValueError unless the space is one of SPACES."""
    if on not in SPACES:
        raise ValueError(f"on: {on!r} is unknown, allowed: {', '.join(SPACES)}")


def space_BND(encoded: EncoderOutput, on: str) -> Tensor:
    """The tokens in one of SPACES."""
    return encoded.require("projected_BND") if on == "projected" else encoded.features_BND


def needs_of_space(on: str) -> frozenset[str]:
    """Fields of EncoderOutput that a reducer reads for a space."""
    return frozenset({"projected_BND"}) if on == "projected" else frozenset()
