"""PruMerge, and its merging of kept tokens with their neighbours."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from atr.core.tokens import gather, top_k_BK
from atr.reduction.arguments import check_implementation, check_least
from atr.reduction.base import EncoderOutput
from atr.reduction.merging import weighted_sums
from atr.reduction.similarity import precise, rounded_cosines_BNN


@dataclass(frozen=True)
class PruMerge:
    """PruMerge (ICCV 2025, arXiv 2403.15388): keeps the outliers of attention and merges their neighbours.

    A kept token x_i becomes x_i + sum of a_j x_j over the `neighbours` tokens with the most similar keys, a
    the attention. `counts` are the outliers of each image, a > Q3 + 1.5 IQR. Raises ValueError for an unknown
    variant and for negative `neighbours`.

    Neighbours are dropped tokens ("paper"), or kept ones as well ("release", where merging changes features
    even if all tokens are kept). Deviations: the release takes the quartiles of the whole batch; here each
    image has its own. The paper leaves the similarity and the scale of a open: here the cosine of keys
    averaged over heads and the attention averaged over heads; the release concatenates the heads' keys and
    takes one softmax over all heads. The release also appends the attention-weighted sum of all dropped
    tokens, which has no position of its own and is left out.
    """

    neighbours: int = 32
    variant: str = "paper"
    needs: ClassVar[frozenset[str]] = frozenset({"attention_BN", "keys_BND"})

    def __post_init__(self) -> None:
        check_least("neighbours", self.neighbours, 0)
        check_implementation("variant", self.variant)

    def __call__(self, encoded: EncoderOutput, budget: int) -> Tensor:
        """Indices of the `budget` most attended tokens of each image."""
        return top_k_BK(encoded.require("attention_BN"), budget)

    def merge(self, encoded: EncoderOutput, budget: int) -> tuple[Tensor, Tensor]:
        """The kept indices, and the kept features with their neighbours added."""
        keep_BK = self(encoded, budget)
        return keep_BK, merge_neighbours(encoded, keep_BK, self.neighbours, self.variant)

    def counts(self, encoded: EncoderOutput) -> Tensor:
        """Number of outliers of each image's attention, 0 if it is uniform; int64 (B,)."""
        attention_BN = precise(encoded.require("attention_BN"))
        ranks = torch.tensor([0.25, 0.75], dtype=attention_BN.dtype, device=attention_BN.device)
        first_B1, third_B1 = attention_BN.quantile(ranks, dim=1)[..., None]
        outlier_BN: Tensor = attention_BN > third_B1 + 1.5 * (third_B1 - first_B1)
        return outlier_BN.sum(dim=1)


def merge_neighbours(encoded: EncoderOutput, keep_BK: Tensor, neighbours: int, variant: str) -> Tensor:
    """Kept features plus the attention-weighted sum of their nearest neighbours by keys; (B, K, D).

    Neighbours are dropped tokens, or in the variant "release" all tokens but the kept one itself.
    """
    own_BKN = F.one_hot(keep_BK, encoded.tokens)
    barred_BKN = own_BKN if variant == "release" else own_BKN.sum(dim=1, keepdim=True)
    similar_BKN = gather(rounded_cosines_BNN(encoded.require("keys_BND")), keep_BK)
    similar_BKN = similar_BKN.masked_fill(barred_BKN > 0, -torch.inf)
    order_BKN = similar_BKN.sort(dim=2, descending=True, stable=True).indices
    near_BKN = torch.zeros_like(own_BKN).scatter_(2, order_BKN[..., :neighbours], 1)
    near_BKN = near_BKN.masked_fill(barred_BKN > 0, 0)  # if fewer than `neighbours` are allowed
    attention_B1N = precise(encoded.require("attention_BN"))[:, None]
    return weighted_sums(own_BKN + near_BKN * attention_B1N, encoded.features_BND)
