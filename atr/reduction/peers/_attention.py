"""Peers that read the encoder's attention, and some its keys: they keep what other tokens look at.

The attention is `EncoderOutput.attention_BN`; ties go to the lower index. Similarities decide between
near-duplicates, and how a sum is rounded depends on the batch it stands in: they are computed in float64 and
rounded to float32, so that neither batch nor kernel chooses.
Shapes: C parts of an image (crops, tiles), M tokens kept by attention, R remaining ones, beside those of
`atr.core.tokens`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from atr.core.tokens import gather, mask_of, top_k_BK
from atr.reduction.base import EncoderOutput

VARIANTS = ("paper", "release")
"""What a method does where its paper and the code released with it differ."""

_TINY = 1e-6
"""Added to HoloV's variance before it divides, as in its release."""


@dataclass(frozen=True)
class ClassAttention:
    """The tokens of highest attention: the core of FasterVLM (arXiv 2412.01818v1) and of HiRED; selects."""

    needs: ClassVar[frozenset[str]] = frozenset({"attention_BN"})
    threshold: ClassVar[float | None] = None

    def __call__(self, encoded: EncoderOutput, budget: int) -> Tensor:
        """Indices of the `budget` most attended tokens of each image."""
        return top_k_BK(self.scores(encoded), budget)

    def scores(self, encoded: EncoderOutput) -> Tensor:
        """The attention; scores_BN."""
        return _given(encoded, "attention_BN")


@dataclass(frozen=True)
class HiRED:
    """HiRED (AAAI 2025, arXiv 2408.10945): a budget for each tile, in a tile the most attended; selects.

    The tile that shows the whole image gets `alpha` of the budget, the others share the rest by the first
    layer's attention to their regions of that one. An image of one tile is ClassAttention's.
    Unclear: which tile a token on a border belongs to (its upper left corner decides), and padding (counted
    with its tile). The release counts the best 1 - alpha of the tokens instead of summing attention, takes
    runs of the raster for regions and rounds shares down: it keeps fewer than asked, so it is no option.
    Raises ValueError unless 0 <= alpha <= 1.
    """

    alpha: float = 0.5
    needs: ClassVar[frozenset[str]] = frozenset({"attention_BN", "first_attention_BN", "grid"})
    threshold: ClassVar[float | None] = None

    def __post_init__(self) -> None:
        _check_fraction("alpha", self.alpha)

    def __call__(self, encoded: EncoderOutput, budget: int) -> Tensor:
        """Indices of the `budget` most attended tokens of each tile."""
        return top_k_BK(self.scores(encoded), budget)

    def scores(self, encoded: EncoderOutput) -> Tensor:
        """The attention; scores_BN."""
        return _given(encoded, "attention_BN")

    def apportion(
        self,
        encoded: EncoderOutput,
        tile: int,
        arrangement: tuple[int, int],
        budget: int,
        sizes: Sequence[int],
    ) -> list[int]:
        """Tokens kept of each tile of the image that `tile` shows whole; the rest as in `apportion`."""
        first_N = _given(encoded, "first_attention_BN")[tile]
        return apportion(budget, first_N, _grid(encoded), arrangement, sizes, self.alpha)


def apportion(
    budget: int,
    first_attention_N: Tensor,
    grid: tuple[int, int],
    arrangement: tuple[int, int],
    sizes: Sequence[int],
    alpha: float = 0.5,
) -> list[int]:
    """HiRED's split of an image's budget over tiles of `sizes` tokens, the first of which shows it whole.

    That tile has the `first_attention_N` and the `grid`; `arrangement` are the rows and columns of the
    others. No count is above its tile's size, and they sum to `budget`: ValueError if that is impossible.
    """
    whole, others = sizes[0], torch.tensor(sizes[1:], dtype=torch.int64)
    _check_budget(budget, sum(sizes))
    first = max(min(_part(alpha, budget), whole), budget - int(others.sum()))
    mass_C = torch.zeros(len(others), dtype=torch.float64)
    if len(others):
        mass_C.index_add_(0, parts_N(grid, arrangement), first_attention_N.cpu().double())
    return [first, *quotas_BC(budget - first, mass_C[None], others)[0].tolist()]


@dataclass(frozen=True)
class PruMerge:
    """PruMerge (ICCV 2025, arXiv 2403.15388): attention's outliers, each with its neighbours; merges.

    A kept token x_i becomes x_i + sum of a_j x_j over its `neighbours` of most similar keys, a the attention.
    Its own count is that of the outliers, a > Q3 + 1.5 IQR, of each image's own attention (the release takes
    the quartiles of the whole batch, so that an image's count depends on its neighbours in it).
    Unclear: the similarity, here the cosine of the head-mean keys (the release's is of all heads' together),
    and a itself, whose softmax the release takes over all heads as one. Neighbours are dropped tokens
    ("paper"), or kept ones as well ("release", where merging changes features even if all are kept). The
    release also appends the attention-weighted sum of all dropped tokens: it has no place of its own and is
    left out. Raises ValueError for a variant that there is not or negative `neighbours`.
    """

    neighbours: int = 32
    variant: str = "paper"
    needs: ClassVar[frozenset[str]] = frozenset({"attention_BN", "keys_BND"})

    def __post_init__(self) -> None:
        _check_least("neighbours", self.neighbours, 0)
        _check_variant(self.variant)

    def __call__(self, encoded: EncoderOutput, budget: int) -> Tensor:
        """Indices of the `budget` most attended tokens of each image."""
        return top_k_BK(_given(encoded, "attention_BN"), budget)

    def merge(self, encoded: EncoderOutput, budget: int) -> tuple[Tensor, Tensor]:
        """The kept indices, and the kept features with those of their neighbours added."""
        keep_BK = self(encoded, budget)
        return keep_BK, _with_neighbours(encoded, keep_BK, self.neighbours, self.variant)

    def counts(self, encoded: EncoderOutput) -> Tensor:
        """Outliers of each image's attention, none where it is even; int64 (B,)."""
        attention_BN = _precise(_given(encoded, "attention_BN"))
        ranks = torch.tensor([0.25, 0.75], dtype=attention_BN.dtype, device=attention_BN.device)
        first_B1, third_B1 = attention_BN.quantile(ranks, dim=1)[..., None]
        outlier_BN: Tensor = attention_BN > third_B1 + 1.5 * (third_B1 - first_B1)
        return outlier_BN.sum(dim=1)


@dataclass(frozen=True)
class PruMergePlus:
    """PruMerge+, of the paper and in the way of `PruMerge`: evenly spread tokens beside the outliers; merges.

    `uniform` of the budget, rounded down, are tokens at an even stride over the raster of those that
    attention did not choose; the rest are the most attended. The release takes a stride over all tokens, of a
    third of N / outliers (thus about three for each outlier), and drops those chosen already: its count
    depends on the overlap. Errors as in `PruMerge`, and ValueError unless 0 <= uniform <= 1.
    """

    uniform: float = 0.75
    neighbours: int = 32
    variant: str = "paper"
    needs: ClassVar[frozenset[str]] = frozenset({"attention_BN", "keys_BND"})

    def __post_init__(self) -> None:
        _check_fraction("uniform", self.uniform)
        _check_least("neighbours", self.neighbours, 0)
        _check_variant(self.variant)

    def __call__(self, encoded: EncoderOutput, budget: int) -> Tensor:
        """Indices of the most attended tokens and of the evenly spread ones."""
        most_BM, spread_BC = _most_and_spread(encoded, budget, _part(self.uniform, budget))
        return torch.cat([most_BM, spread_BC], dim=1).sort(dim=1).values

    def merge(self, encoded: EncoderOutput, budget: int) -> tuple[Tensor, Tensor]:
        """The kept indices, and the kept features with those of their neighbours added."""
        keep_BK = self(encoded, budget)
        return keep_BK, _with_neighbours(encoded, keep_BK, self.neighbours, self.variant)


@dataclass(frozen=True)
class VisionZip:
    """VisionZip (CVPR 2025, arXiv 2412.04467): dominant tokens, and contextual ones of the rest; merges.

    `contextual` of the budget, rounded down, are targets at an even stride over the raster of the tokens that
    attention did not choose; each other token goes to the target of most similar keys. The default meets all
    of the paper's splits: 54 + 10, 108 + 20 and 162 + 30. A target becomes the mean of itself and its tokens
    ("paper"), or itself plus the mean of its tokens ("release").
    Unclear: the stride where it is not whole. The release rounds it down and has no target in the last rows.
    Its dominant tokens include the class token, which is not among the features here.
    Raises ValueError for a variant that there is not and unless 0 <= contextual <= 1.
    """

    contextual: float = 5 / 32
    variant: str = "paper"
    needs: ClassVar[frozenset[str]] = frozenset({"attention_BN", "keys_BND"})

    def __post_init__(self) -> None:
        _check_fraction("contextual", self.contextual)
        _check_variant(self.variant)

    def __call__(self, encoded: EncoderOutput, budget: int) -> Tensor:
        """Indices of the dominant and of the contextual tokens."""
        return torch.cat(self._chosen(encoded, budget), dim=1).sort(dim=1).values

    def merge(self, encoded: EncoderOutput, budget: int) -> tuple[Tensor, Tensor]:
        """The kept indices; features of dominant tokens as they are, of contextual ones merged."""
        dominant_BM, target_BC = self._chosen(encoded, budget)
        keep_BK = torch.cat([dominant_BM, target_BC], dim=1).sort(dim=1).values
        own_BKN = F.one_hot(keep_BK, encoded.tokens)
        others_BKN = self._belongs(encoded, keep_BK, target_BC)
        counts_BK1 = others_BKN.sum(dim=2, keepdim=True)
        if self.variant == "paper":
            weights_BKN = _precise(own_BKN + others_BKN) / (1 + counts_BK1)
        else:
            weights_BKN = own_BKN + _precise(others_BKN) / counts_BK1.clamp_min(1)
        return keep_BK, _weighted(weights_BKN, encoded.features_BND)

    def _chosen(self, encoded: EncoderOutput, budget: int) -> tuple[Tensor, Tensor]:
        return _most_and_spread(encoded, budget, _part(self.contextual, budget))

    def _belongs(self, encoded: EncoderOutput, keep_BK: Tensor, target_BC: Tensor) -> Tensor:
        """1 where a dropped token goes to a kept one, which is always a target, else 0; int64 (B, K, N)."""
        if not target_BC.shape[1]:
            return keep_BK.new_zeros(*keep_BK.shape, encoded.tokens)
        is_target_B1N = mask_of(target_BC, encoded.tokens)[:, None] > 0
        similar_BNN = cosine_BNN(_given(encoded, "keys_BND")).masked_fill(~is_target_B1N, -torch.inf)
        dropped_B1N = mask_of(keep_BK, encoded.tokens)[:, None] == 0
        return ((similar_BNN.argmax(dim=2)[:, None] == keep_BK[..., None]) & dropped_B1N).long()


@dataclass(frozen=True)
class VisPruner:
    """VisPruner (ICCV 2025, arXiv 2412.01818v2): important tokens, and of the rest no duplicates; selects.

    `important` of the budget, rounded down, are the most attended. The rest is ordered by attention; again
    and again every other token of it is compared with those between, and the up to `step` most similar to one
    of these go. Similarity is the cosine of features.
    Unclear: the order after a step; as in the release the compared ones come first, by falling similarity,
    then those between. The release takes one image at a time.
    Raises ValueError unless 0 <= important <= 1 and step >= 1.
    """

    important: float = 0.5
    step: int = 8
    needs: ClassVar[frozenset[str]] = frozenset({"attention_BN"})

    def __post_init__(self) -> None:
        _check_fraction("important", self.important)
        _check_least("step", self.step, 1)

    def __call__(self, encoded: EncoderOutput, budget: int) -> Tensor:
        """Indices of the important tokens and of the distinct ones."""
        order_BN, important = _by_attention(encoded, budget), _part(self.important, budget)
        distinct = budget - important
        # Where all are important no other is to stay, and the last would have none to be compared with.
        rest_BR = order_BN[:, important:] if distinct else order_BN[:, :0]
        similar_BNN = cosine_BNN(encoded.features_BND)
        while rest_BR.shape[1] > distinct:
            rest_BR = _thinned(rest_BR, similar_BNN, min(self.step, rest_BR.shape[1] - distinct))
        return torch.cat([order_BN[:, :important], rest_BR], dim=1).sort(dim=1).values


@dataclass(frozen=True)
class HoloV:
    """HoloV (NeurIPS 2025, arXiv 2510.02912): a quota for each crop, in a crop the most attended; selects.

    A token's score is its attention plus `beta` times the variance of its cosine to the other tokens of its
    crop, scaled to the mean of the attention; the quotas are in proportion to the crops' mean scores.
    Unclear: the crops and the scale. Crops are those of a grid of `side` x `side`, of fewer where there are
    fewer rows or columns, and the variance is scaled over the image ("paper"); or runs of the raster, the
    variance scaled over each crop, which adds the same to every crop and so decides nothing ("release").
    The release fills a quota above its crop's size up with zeros; here other crops get what is left.
    Raises ValueError for a variant that there is not, side < 1 or beta < 0.
    """

    side: int = 4
    beta: float = 0.09
    variant: str = "paper"
    needs: ClassVar[frozenset[str]] = frozenset({"attention_BN", "grid"})

    def __post_init__(self) -> None:
        _check_variant(self.variant)
        _check_least("side", self.side, 1)
        _check_least("beta", self.beta, 0)

    def __call__(self, encoded: EncoderOutput, budget: int) -> Tensor:
        """Indices of the most attended tokens of each crop, as many as its quota."""
        order_BN = _by_attention(encoded, budget)
        crop_N = self._crops_N(encoded).to(order_BN.device)
        of_crop_NC = F.one_hot(crop_N)
        scores_BC = self._scores_BC(encoded, of_crop_NC)
        quotas_BN = quotas_BC(budget, scores_BC, of_crop_NC.sum(dim=0))[:, crop_N]
        # How many tokens of its own crop come before each, most attended first.
        before_BNC = of_crop_NC[order_BN].cumsum(dim=1)
        before_BN = before_BNC.take_along_dim(crop_N[order_BN][..., None], dim=2)[..., 0] - 1
        chosen_BN = before_BN < quotas_BN.take_along_dim(order_BN, dim=1)
        return order_BN[chosen_BN].reshape(len(order_BN), budget).sort(dim=1).values

    def _crops_N(self, encoded: EncoderOutput) -> Tensor:
        if self.variant == "release":
            return parts_N((1, encoded.tokens), (1, min(self.side**2, encoded.tokens)))
        rows, columns = _grid(encoded)
        return parts_N((rows, columns), (min(self.side, rows), min(self.side, columns)))

    def _scores_BC(self, encoded: EncoderOutput, of_crop_NC: Tensor) -> Tensor:
        """Mean score of each crop, which float32 rounds; that of equal crops is equal."""
        mean_NC = _precise(of_crop_NC) / of_crop_NC.sum(dim=0)
        attention_BN = _precise(_given(encoded, "attention_BN"))
        attention_BC = attention_BN @ mean_NC
        variance_BN = _variance_BN(cosine_BNN(encoded.features_BND), of_crop_NC)
        variance_BC = variance_BN @ mean_NC
        if self.variant == "release":
            scale = attention_BC / (variance_BC + _TINY)
        else:
            scale = (attention_BN.mean(1) / (variance_BN.mean(1) + _TINY))[:, None]
        return (attention_BC + self.beta * scale * variance_BC).float()


def quotas_BC(total: int, weights_BC: Tensor, sizes_C: Tensor) -> Tensor:
    """Split `total` over parts in proportion to weights, of which none is negative; int64 (B, C).

    The counts of a row sum to `total` and none is above its part's size: what a part cannot take, the others
    share by their weights, or by their sizes where these are all zero. Whole numbers by largest remainder,
    ties to the first part. Raises ValueError for a total of more than the sizes.
    """
    _check_budget(total, int(sizes_C.sum()))
    weights_BC = _precise(weights_BC)
    sizes_BC = sizes_C.to(weights_BC).expand_as(weights_BC)
    share_BC, full_BC = torch.zeros_like(weights_BC), torch.zeros_like(weights_BC, dtype=torch.bool)
    for _ in sizes_C:  # each round fills a part, or is the last to change anything
        left_B1 = total - sizes_BC.where(full_BC, 0).sum(dim=1, keepdim=True)
        open_BC = weights_BC.masked_fill(full_BC, 0)
        open_BC = open_BC.where(open_BC.sum(dim=1, keepdim=True) > 0, sizes_BC.masked_fill(full_BC, 0))
        in_all_B1 = open_BC.sum(dim=1, keepdim=True)
        share_BC = sizes_BC.where(full_BC, left_B1 * open_BC / in_all_B1.where(in_all_B1 > 0, 1))
        full_BC = full_BC | (share_BC >= sizes_BC)
    whole_BC = share_BC.floor()
    # In float32, which takes for equal what only rounding tells apart.
    rest_BC = (share_BC - whole_BC).float()
    place_BC = rest_BC.sort(dim=1, descending=True, stable=True).indices.argsort(dim=1)
    return whole_BC.long() + (place_BC < total - whole_BC.sum(dim=1, keepdim=True))


def parts_N(grid: tuple[int, int], parts: tuple[int, int]) -> Tensor:
    """Which of the parts, themselves rows and columns, each token lies in; as even as may be; int64 (N,)."""
    row, column = (torch.arange(cells) * count // cells for cells, count in zip(grid, parts, strict=True))
    return (row[:, None] * parts[1] + column).flatten()


def cosine_BNN(features_BND: Tensor) -> Tensor:
    """Cosine of every pair of tokens, float32 (B, N, N): of equal tokens equal, in any batch."""
    unit_BND = F.normalize(_precise(features_BND), dim=2)
    return (unit_BND @ unit_BND.mT).float()


def _with_neighbours(encoded: EncoderOutput, keep_BK: Tensor, neighbours: int, variant: str) -> Tensor:
    """The kept features with the attention-weighted sum of their nearest by keys added; (B, K, D)."""
    own_BKN = F.one_hot(keep_BK, encoded.tokens)
    barred_BKN = own_BKN if variant == "release" else own_BKN.sum(dim=1, keepdim=True)
    similar_BKN = gather(cosine_BNN(_given(encoded, "keys_BND")), keep_BK).masked_fill(
        barred_BKN > 0, -torch.inf
    )
    order_BKN = similar_BKN.sort(dim=2, descending=True, stable=True).indices
    near_BKN = torch.zeros_like(own_BKN).scatter_(2, order_BKN[..., :neighbours], 1)
    near_BKN = near_BKN.masked_fill(barred_BKN > 0, 0)  # where there are fewer than that
    attention_B1N = _precise(_given(encoded, "attention_BN"))[:, None]
    return _weighted(own_BKN + near_BKN * attention_B1N, encoded.features_BND)


def _most_and_spread(encoded: EncoderOutput, budget: int, spread: int) -> tuple[Tensor, Tensor]:
    """The most attended tokens, and `spread` at an even stride over the raster of the others."""
    order_BN = _by_attention(encoded, budget)
    most_BM, rest_BR = order_BN.tensor_split([budget - spread], dim=1)
    rest = rest_BR.shape[1]
    stride_C = torch.arange(spread, device=rest_BR.device) * rest // max(spread, 1)
    return most_BM, rest_BR.sort(dim=1).values[:, stride_C]


def _thinned(rest_BR: Tensor, similar_BNN: Tensor, drop: int) -> Tensor:
    """Without up to `drop` of every other token: those most similar to one of the tokens between."""
    even_BE, odd_BO = rest_BR[:, ::2], rest_BR[:, 1::2]
    similar_BEO = gather(similar_BNN, even_BE).take_along_dim(odd_BO[:, None], dim=2)
    order_BE = similar_BEO.amax(dim=2).sort(dim=1, descending=True, stable=True).indices
    return torch.cat([even_BE.take_along_dim(order_BE[:, drop:], dim=1), odd_BO], dim=1)


def _variance_BN(similar_BNN: Tensor, of_crop_NC: Tensor) -> Tensor:
    """Variance of each token's similarity to the others of its crop, zero where there are none."""
    others_NN = _precise((of_crop_NC @ of_crop_NC.T).fill_diagonal_(0))
    count_N = others_NN.sum(dim=1).clamp_min(1)
    similar_BNN = _precise(similar_BNN)
    mean_BN = (similar_BNN * others_NN).sum(dim=2) / count_N
    return ((similar_BNN - mean_BN[..., None]).square() * others_NN).sum(dim=2) / count_N


def _weighted(weights_BKN: Tensor, features_BND: Tensor) -> Tensor:
    """Weighted sums of features, in their own dtype; (B, K, D)."""
    return (_precise(weights_BKN) @ _precise(features_BND)).to(features_BND.dtype)


def _by_attention(encoded: EncoderOutput, budget: int) -> Tensor:
    """All tokens, the most attended first; raises ValueError for a budget of more tokens than there are."""
    _check_budget(budget, encoded.tokens)
    return _given(encoded, "attention_BN").sort(dim=1, descending=True, stable=True).indices


def _precise(values: Tensor) -> Tensor:
    """In float64, or on Apple's GPUs, which have none, in float32."""
    return values.to(torch.float32 if values.device.type == "mps" else torch.float64)


def _part(fraction: float, budget: int) -> int:
    # Decimal, because a binary 0.29 * 100 lies below the 29 that was meant.
    return int(Decimal(str(fraction)) * budget)


def _given(encoded: EncoderOutput, field: str) -> Tensor:
    values: Tensor | None = getattr(encoded, field)
    if values is None:
        raise ValueError(f"{field} was not encoded, which the reducer needs")
    return values


def _grid(encoded: EncoderOutput) -> tuple[int, int]:
    if encoded.grid is None:
        raise ValueError("grid was not encoded, which the reducer needs")
    return encoded.grid


def _check_budget(budget: int, tokens: int) -> None:
    if not 0 <= budget <= tokens:
        raise ValueError(f"budget: {budget} is out of range, allowed: 0 to {tokens} tokens")


def _check_fraction(key: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{key}: {value} is out of range, allowed: a fraction 0 <= {key} <= 1")


def _check_variant(variant: str) -> None:
    if variant not in VARIANTS:
        raise ValueError(f"variant: {variant!r} is unknown, allowed: {', '.join(VARIANTS)}")


def _check_least(key: str, value: float, least: int) -> None:
    if value < least:
        raise ValueError(f"{key}: {value} is out of range, allowed: {least} or more")
