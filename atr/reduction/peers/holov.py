"""HoloV: a quota for each crop of the image, and in a crop the most attended tokens; C crops."""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from atr.reduction.arguments import check_implementation, check_least
from atr.reduction.attention_ranking import attention_order_BN
from atr.reduction.base import EncoderOutput, Reducer
from atr.reduction.quotas import parts_N, quotas_BC
from atr.reduction.similarity import precise, rounded_cosines_BNN

NEEDS = ("attention_BN", "grid")
ONE_TILE = True

_TINY = 1e-6
"""Added to the variance before it divides, as in the release."""


@dataclass(frozen=True)
class HoloV:
    """HoloV (NeurIPS 2025, arXiv 2510.02912): a quota for each crop, in a crop the most attended tokens.

    A token's score is its attention plus `beta` times the variance of its cosine to the other tokens of its
    crop, scaled to the mean of the attention; the quotas are in proportion to the crops' mean scores. Raises
    ValueError for an unknown variant, side < 1 and beta < 0.

    The paper leaves open the crops and the scale. "paper": crops are the cells of a grid of `side` x `side`
    (fewer if the image has fewer rows or columns), and the variance is scaled over the image. "release":
    crops are runs of the raster, and the variance is scaled over each crop, which multiplies the
    scores of all crops by the same factor and so changes no quota. The release fills up a quota above its
    crop's size with zeros; here the excess goes to other crops.
    """

    side: int = 4
    beta: float = 0.09
    variant: str = "paper"
    needs: ClassVar[frozenset[str]] = frozenset({"attention_BN", "grid"})

    def __post_init__(self) -> None:
        check_implementation("variant", self.variant)
        check_least("side", self.side, 1)
        check_least("beta", self.beta, 0)

    def __call__(self, encoded: EncoderOutput, budget: int) -> Tensor:
        """Indices of the most attended tokens of each crop, as many as its quota."""
        order_BN = attention_order_BN(encoded, budget)
        crop_N = self._crops_N(encoded).to(order_BN.device)
        of_crop_NC = F.one_hot(crop_N)
        scores_BC = self._scores_BC(encoded, of_crop_NC)
        quotas_BN = quotas_BC(budget, scores_BC, of_crop_NC.sum(dim=0))[:, crop_N]
        # For each token, how many more attended tokens its own crop has.
        before_BNC = of_crop_NC[order_BN].cumsum(dim=1)
        before_BN = before_BNC.take_along_dim(crop_N[order_BN][..., None], dim=2)[..., 0] - 1
        chosen_BN = before_BN < quotas_BN.take_along_dim(order_BN, dim=1)
        return order_BN[chosen_BN].reshape(len(order_BN), budget).sort(dim=1).values

    def _crops_N(self, encoded: EncoderOutput) -> Tensor:
        if self.variant == "release":
            return parts_N((1, encoded.tokens), (1, min(self.side**2, encoded.tokens)))
        rows, columns = encoded.require_grid()
        return parts_N((rows, columns), (min(self.side, rows), min(self.side, columns)))

    def _scores_BC(self, encoded: EncoderOutput, of_crop_NC: Tensor) -> Tensor:
        """Mean score of each crop, rounded to float32, so that equal crops have equal scores."""
        mean_NC = precise(of_crop_NC) / of_crop_NC.sum(dim=0)
        attention_BN = precise(encoded.require("attention_BN"))
        attention_BC = attention_BN @ mean_NC
        variance_BN = _variance_BN(rounded_cosines_BNN(encoded.features_BND), of_crop_NC)
        variance_BC = variance_BN @ mean_NC
        if self.variant == "release":
            scale = attention_BC / (variance_BC + _TINY)
        else:
            scale = (attention_BN.mean(1) / (variance_BN.mean(1) + _TINY))[:, None]
        return (attention_BC + self.beta * scale * variance_BC).float()


def _variance_BN(similar_BNN: Tensor, of_crop_NC: Tensor) -> Tensor:
    """Variance of each token's similarity to the others of its crop, zero if it is alone there."""
    others_NN = precise((of_crop_NC @ of_crop_NC.T).fill_diagonal_(0))
    count_N = others_NN.sum(dim=1).clamp_min(1)
    similar_BNN = precise(similar_BNN)
    mean_BN = (similar_BNN * others_NN).sum(dim=2) / count_N
    return ((similar_BNN - mean_BN[..., None]).square() * others_NN).sum(dim=2) / count_N


def build(seed: int = 0) -> Reducer:
    """HoloV with its defaults."""
    return HoloV()
