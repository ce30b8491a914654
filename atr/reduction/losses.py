"""The loss of the paper, Eq. 7: ||R(S(F)) - F||_2 + max(L_pr, p)."""

from collections.abc import Callable

import torch
from torch import Tensor


def unexplained_variance(restored_BND: Tensor, features_BND: Tensor, variance: Tensor) -> Tensor:
    """Mean squared error over all tokens and channels, over the variance: 1 for always guessing the mean."""
    return (restored_BND - features_BND).square().mean() / variance


def l2_norm(restored_BND: Tensor, features_BND: Tensor, variance: Tensor) -> Tensor:
    """The distance as Eq. 7 prints it, a norm over an image's tokens and channels; `variance` does not enter.

    It grows with tokens, width and the encoder's scale, against a second term that never exceeds 1.
    """
    distance_B: Tensor = torch.linalg.vector_norm(restored_BND - features_BND, dim=(1, 2))
    return distance_B.mean()


RECONSTRUCTION: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "variance": unexplained_variance,
    "none": l2_norm,
}
"""The first term of Eq. 7 by the name of its normalisation."""


def kept_fraction(mask_BN: Tensor) -> Tensor:
    """L_pr of each image, the share of its tokens that are kept; kept_B."""
    return mask_BN.mean(dim=1)


def at_least(kept_B: Tensor, p: float) -> Tensor:
    """max(L_pr, p), the second term of Eq. 7, a mean over images: below p nothing is gained by dropping more.

    The maximum is taken of each image, as the equation has it, and not of the batch: full images would keep
    their tokens at the cost of empty ones, and the order among them, which a budget needs, stay unlearned.
    """
    return kept_B.clamp_min(p).mean()
