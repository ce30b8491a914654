"""Features of several tokens combined into one; G groups."""

import torch
from torch import Tensor

from atr.core.tokens import gather
from atr.reduction.similarity import precise


def group_means(values_BND: Tensor, group_BN: Tensor, groups: int) -> Tensor:
    """Mean of the tokens of each group, none of them empty, summed in float32 or better; (B, G, D)."""
    sizes_BG = torch.zeros(len(group_BN), groups, dtype=torch.int64, device=group_BN.device)
    sizes_BG.scatter_add_(1, group_BN, torch.ones_like(group_BN))
    # Sorted, because a GPU adds scattered values in no fixed order.
    sorted_BND = gather(values_BND, group_BN.argsort(dim=1, stable=True))
    precise_BND = sorted_BND.to(torch.promote_types(values_BND.dtype, torch.float32))
    means_BGD: Tensor = torch.segment_reduce(precise_BND, "mean", lengths=sizes_BG, axis=1)
    return means_BGD.to(values_BND.dtype)


def weighted_sums(weights_BKN: Tensor, features_BND: Tensor) -> Tensor:
    """Weighted sums of features, computed in float64, in the features' own dtype; (B, K, D)."""
    return (precise(weights_BKN) @ precise(features_BND)).to(features_BND.dtype)
