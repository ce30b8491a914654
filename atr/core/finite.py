"""NaN and infinity, refused where values come in: a sort takes them without a word."""

from collections.abc import Mapping

import torch
from torch import Tensor


def check_finite_weights(weights: Mapping[str, Tensor], where: str) -> None:
    """Raise ValueError with `where`, the first tensor's name and how many there are, if any is not finite.

    Tensors that are not in memory (on the meta device) are passed over.
    """
    broken = [name for name, values in weights.items() if not _are_finite(values)]
    if broken:
        count = int((~weights[broken[0]].isfinite()).sum())
        raise ValueError(
            f"{where}: {len(broken)} of {len(weights)} tensors hold NaN or infinity, first {broken[0]} "
            f"({count} of its {weights[broken[0]].numel()} values), allowed: finite weights"
        )


def check_finite(values: Tensor, where: str) -> None:
    """Raise ValueError with `where` and the images, indices of the first dimension, that are not finite."""
    if not _are_finite(values):
        images = (~values.flatten(1).isfinite().all(dim=1)).nonzero().flatten().tolist()
        raise ValueError(
            f"{where} of images {images} of {len(values)} holds NaN or infinity, allowed: finite values"
        )


def _are_finite(values: Tensor) -> bool:
    if not values.is_floating_point() or values.is_meta or not values.numel():
        return True
    # NaN is the smallest and the largest of values that it is among; isfinite of all takes ten times as long.
    return bool(torch.stack(values.aminmax()).isfinite().all())
