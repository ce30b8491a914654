"""The training loss, Eq. 7 of the paper: ||R(S(F)) - F||_2 + max(L_pr, p).

Of a ragged batch, whose images follow one another in (1, T, D), each loss is the mean over images too.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from atr.core.ragged import RaggedGrids, of_each_image


def unexplained_variance(restored_BND: Tensor, features_BND: Tensor, variance: Tensor) -> Tensor:
    """Mean squared error over tokens and channels, divided by the variance: 1 for predicting the mean."""
    return (restored_BND - features_BND).square().mean() / variance


def l2_norm(restored_BND: Tensor, features_BND: Tensor, variance: Tensor) -> Tensor:
    """The distance as printed in Eq. 7: a norm over an image's tokens and channels; `variance` is unused.

    It grows with tokens, width and the encoder's scale, while the second term of the loss never exceeds 1.
    """
    distance_B: Tensor = torch.linalg.vector_norm(restored_BND - features_BND, dim=(1, 2))
    return distance_B.mean()


RECONSTRUCTION: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "variance": unexplained_variance,
    "none": l2_norm,
}
"""The first term of Eq. 7 by the name of its normalisation."""


def reconstruction_loss(
    normalise: str,
    restored_BND: Tensor,
    features_BND: Tensor,
    variance: Tensor,
    grids: RaggedGrids | None = None,
) -> Tensor:
    """The first term of Eq. 7, averaged over images; `normalise` is a key of RECONSTRUCTION."""
    parts = (of_each_image(values, grids) for values in (restored_BND, features_BND))
    distances = [
        RECONSTRUCTION[normalise](restored, features, variance)
        for restored, features in zip(*parts, strict=True)
    ]
    return torch.stack(distances).mean()


def kept_fraction(mask_BN: Tensor, grids: RaggedGrids | None = None) -> Tensor:
    """L_pr of each image: the fraction of its tokens that are kept; kept_B."""
    return torch.cat([mask.mean(dim=1) for mask in of_each_image(mask_BN, grids)])


def at_least(kept_B: Tensor, p: float) -> Tensor:
    """max(L_pr, p), the second term of Eq. 7, averaged over images; dropping below p gains nothing.

    The maximum is taken per image, as in the equation. With the batch's mean, dense images would be kept
    whole, empty ones dropped, and tokens within an image not ranked.
    """
    return kept_B.clamp_min(p).mean()
