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
    return _to_multiples(units_BND @ units_BND.mT, _COSINE)


def grid_units(vectors: Tensor) -> Tensor:
    """Vectors (..., D) at unit length, 0 for a zero vector, rounded to multiples of 2^-26; float64."""
    tiny = torch.finfo(torch.float64).tiny
    return to_grid(F.normalize(vectors.double(), dim=-1, eps=tiny))


def to_grid(values: Tensor) -> Tensor:
    """Values rounded to multiples of 2^-26, float64."""
    return _to_multiples(values.double(), _UNIT)


def _to_multiples(values: Tensor, of_one: float) -> Tensor:
    return (values * of_one).round() / of_one


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
