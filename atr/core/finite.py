"""Checks that refuse NaN and infinity in inputs: sorting would accept them silently."""

from collections.abc import Mapping

import torch
from torch import Tensor


def check_finite_weights(weights: Mapping[str, Tensor], where: str) -> None:
    """Raise ValueError if any tensor is not finite; names `where`, the number of such tensors and the first.

    Tensors on the meta device are skipped.
    """
    broken = [name for name, values in weights.items() if not are_finite(values)]
    if broken:
        count = int((~weights[broken[0]].isfinite()).sum())
        raise ValueError(
            f"{where}: {len(broken)} of {len(weights)} tensors hold NaN or infinity, first {broken[0]} "
            f"({count} of its {weights[broken[0]].numel()} values), allowed: finite weights"
        )


def check_finite(values: Tensor, where: str) -> None:
    """Raise ValueError if any value is not finite; names `where` and indices along the first dimension."""
    if not are_finite(values):
        images = (~values.flatten(1).isfinite().all(dim=1)).nonzero().flatten().tolist()
        raise ValueError(
            f"{where} of images {images} of {len(values)} holds NaN or infinity, allowed: finite values"
        )


def are_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite; True for integers, and for tensors on the meta device."""
    if not values.is_floating_point() or values.is_meta or not values.numel():
        return True
    # aminmax propagates NaN, and checking its two values is ten times as fast as isfinite of all.
    return bool(torch.stack(values.aminmax()).isfinite().all())
