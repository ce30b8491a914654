"""VisPruner: the most attended tokens, and the rest without near duplicates.

Shapes: E tokens at even places of the rest, O at odd places, R in all.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from atr.core.tokens import gather
from atr.reduction.arguments import check_fraction, check_least, part_of
from atr.reduction.attention_ranking import attention_order_BN
from atr.reduction.base import EncoderOutput, Reducer
from atr.reduction.similarity import rounded_cosines_BNN

NEEDS = ("attention_BN",)


@dataclass(frozen=True)
class VisPruner:
    """VisPruner (ICCV 2025, arXiv 2412.01818v2): important tokens, and diverse ones of the rest.

    `important` of the budget, rounded down, are the most attended tokens. The rest is ordered by attention.
    Each step compares its tokens at even places with those at odd places, and drops up to `step` of the even
    ones that are most similar to an odd one, until the budget is met. Similarity is the cosine of features.
    Raises ValueError unless 0 <= important <= 1 and step >= 1.

    The paper leaves open the order after a step; as in the release the even ones come first, by falling
    similarity, then the odd ones. The release handles one image at a time.
    """

    important: float = 0.5
    step: int = 8
    needs: ClassVar[frozenset[str]] = frozenset({"attention_BN"})

    def __post_init__(self) -> None:
        check_fraction("important", self.important)
        check_least("step", self.step, 1)

    def __call__(self, encoded: EncoderOutput, budget: int) -> Tensor:
        """Indices of the important tokens and of the diverse ones."""
        order_BN, important = attention_order_BN(encoded, budget), part_of(self.important, budget)
        diverse = budget - important
        # If no diverse token is kept, the last token of the rest would have no other to compare with.
        rest_BR = order_BN[:, important:] if diverse else order_BN[:, :0]
        similar_BNN = rounded_cosines_BNN(encoded.features_BND)
        while rest_BR.shape[1] > diverse:
            rest_BR = _thinned(rest_BR, similar_BNN, min(self.step, rest_BR.shape[1] - diverse))
        return torch.cat([order_BN[:, :important], rest_BR], dim=1).sort(dim=1).values


def _thinned(rest_BR: Tensor, similar_BNN: Tensor, drop: int) -> Tensor:
    """Drop up to `drop` of the tokens at even places: those most similar to a token at an odd place."""
    even_BE, odd_BO = rest_BR[:, ::2], rest_BR[:, 1::2]
    similar_BEO = gather(similar_BNN, even_BE).take_along_dim(odd_BO[:, None], dim=2)
    order_BE = similar_BEO.amax(dim=2).sort(dim=1, descending=True, stable=True).indices
    return torch.cat([even_BE.take_along_dim(order_BE[:, drop:], dim=1), odd_BO], dim=1)


def build(seed: int = 0) -> Reducer:
    """VisPruner with its defaults."""
    return VisPruner()
