"""Tokens ranked by the attention they receive; ties go to the lower index.

Shapes: M most attended tokens, R remaining ones, C of these at an even stride.
"""

import torch
from torch import Tensor

from atr.reduction.arguments import check_budget
from atr.reduction.base import EncoderOutput


def attention_order_BN(encoded: EncoderOutput, budget: int) -> Tensor:
    """All tokens, the most attended first; raises ValueError unless 0 <= budget <= N."""
    check_budget(budget, encoded.tokens)
    return encoded.require("attention_BN").sort(dim=1, descending=True, stable=True).indices


def attended_and_spread(encoded: EncoderOutput, budget: int, spread: int) -> tuple[Tensor, Tensor]:
    """The `budget` - `spread` most attended tokens, and `spread` of the rest at an even stride.

    The stride is over the raster. int64 (B, M) by falling attention, and (B, C) in raster order.
    """
    order_BN = attention_order_BN(encoded, budget)
    most_BM, rest_BR = order_BN.tensor_split([budget - spread], dim=1)
    rest = rest_BR.shape[1]
    stride_C = torch.arange(spread, device=rest_BR.device) * rest // max(spread, 1)
    return most_BM, rest_BR.sort(dim=1).values[:, stride_C]
