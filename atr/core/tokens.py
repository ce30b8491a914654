"""Pure tensor functions on visual tokens: no module, no configuration, no model.

Shapes: the suffix of a tensor's name gives its dimensions in order, here and in every other file.

    B  images (or tiles) of a batch; rows of a language model's batch
    N  tokens of an image (or tile) in raster order, special tokens excluded
    K  kept tokens
    D  width of a feature; keys, projected tokens and texts have widths of their own
    C  channels of pixels or of an attention head; parts of an image; classes
    H  height and W width of pixels; H attention heads
    G  groups of tokens, or the tokens that several tiles share
    M  tokens that attention keeps; R the remaining ones
    S  images of a shard; seeds; tokens of a shortened sequence
    P  tokens of all tiles of an image, packed into one sequence; patches
    T  tokens of a vision tower, special tokens included; tiles of an image; tokens of a ragged batch
    L  tokens of a language model's sequence; layers
    V  entries of a vocabulary
    A  answer tokens of a batch; E end tokens
    I  images; U units of a bootstrap; R its resamples, or rows of a grid
    O  the other side of a pair
    X  any remaining dimensions
    1, 2, 3, 4  a dimension of that length

A file that uses a letter otherwise says so in its docstring.
"""

import math
from collections.abc import Sequence
from decimal import ROUND_HALF_UP, Decimal
from numbers import Integral, Real

import torch
from torch import Tensor


def gumbel_mask_BN(logits_BN: Tensor, temperature: float, generator: torch.Generator | None = None) -> Tensor:
    """Sample a binary mask, P(keep) = sigmoid(logit), with a straight-through gradient; float32 (B, N).

    Equal in distribution to the paper's Gumbel-softmax over {keep, drop}: only the difference of its two
    logits matters, and the difference of two Gumbel variables is logistic, so one logit with logistic noise
    suffices. The forward value is exactly 0 or 1; the gradient is that of
    sigmoid((logit + noise) / temperature).
    """
    logits_BN = logits_BN.float()
    tiny = torch.finfo(torch.float32).tiny
    uniform_BN = torch.rand(logits_BN.shape, generator=generator, device=logits_BN.device).clamp_min(tiny)
    noise_BN = uniform_BN.log() - torch.log1p(-uniform_BN)
    soft_BN = torch.sigmoid((logits_BN + noise_BN) / temperature)
    hard_BN = (logits_BN + noise_BN > 0).float()
    # The bracket is exactly zero, so the mask stays exactly binary.
    return hard_BN + (soft_BN - soft_BN.detach())


def perturb_BN(scores_BN: Tensor, temperature: float, generator: torch.Generator | None = None) -> Tensor:
    """Scores with Gumbel noise of scale `temperature`; float32 (B, N).

    Their top k are a sample without replacement (Kool et al., ICML 2019).
    """
    scores_BN = scores_BN.float()
    tiny = torch.finfo(torch.float32).tiny
    uniform_BN = torch.rand(scores_BN.shape, generator=generator, device=scores_BN.device).clamp_min(tiny)
    return scores_BN - temperature * (-uniform_BN.log()).log()


def top_k_mask_BN(scores_BN: Tensor, k_B: Tensor) -> Tensor:
    """Mask of the k highest scores of each image, 1 <= k <= N, with a straight-through gradient; (B, N).

    The forward value is exactly 0 or 1; the gradient is that of a sigmoid of the distance to the lowest kept
    score.
    """
    order_BN = scores_BN.sort(dim=1, descending=True, stable=True).indices
    lowest_B1 = scores_BN.take_along_dim(order_BN, dim=1).take_along_dim(k_B.unsqueeze(1) - 1, dim=1)
    hard_BN = (order_BN.argsort(dim=1) < k_B.unsqueeze(1)).to(scores_BN.dtype)
    soft_BN = torch.sigmoid(scores_BN - lowest_B1)
    return hard_BN + (soft_BN - soft_BN.detach())


def random_mask_BN(images: int, tokens: int, generator: torch.Generator) -> Tensor:
    """Keep 1 to N random tokens per image, uniform over counts and over sets of a count; float32 (B, N)."""
    device = generator.device
    rank_BN = torch.rand(images, tokens, generator=generator, device=device).argsort(dim=1)
    count_B1 = torch.randint(1, tokens + 1, (images, 1), generator=generator, device=device)
    return (rank_BN < count_B1).float()


def top_k_BK(scores_BN: Tensor, k: int) -> Tensor:
    """Indices of the k highest scores of each row, in raster order; ties go to the lower index; int64 (B, k).

    Raises ValueError unless 0 <= k <= N.
    """
    tokens = scores_BN.shape[-1]
    if not 0 <= k <= tokens:
        raise ValueError(f"k: {k} is out of range, allowed: 0 <= k <= {tokens} tokens")
    # torch.topk breaks ties arbitrarily; a stable sort breaks them equally on every device and in any batch.
    order_BN = scores_BN.sort(dim=-1, descending=True, stable=True).indices
    return order_BN[..., :k].sort(dim=-1).values


def replace_dropped(features_BND: Tensor, mask_BN: Tensor, vector_D: Tensor) -> Tensor:
    """Replace every dropped token by one vector: M * F + (1 - M) * E_masked; (B, N, D).

    A product rather than an index, so that gradients reach the mask.
    """
    mask_BN1 = mask_BN.unsqueeze(-1)
    return mask_BN1 * features_BND + (1 - mask_BN1) * vector_D


def gather(features_BND: Tensor, keep_BK: Tensor) -> Tensor:
    """Features at the kept indices; (B, K, D)."""
    return features_BND.take_along_dim(keep_BK.unsqueeze(-1), dim=1)


def mask_of(keep_BK: Tensor, tokens: int) -> Tensor:
    """Mask of kept indices, 1 kept and 0 dropped; float32 (B, N)."""
    mask_BN = torch.zeros(*keep_BK.shape[:-1], tokens, device=keep_BK.device)
    return mask_BN.scatter_(-1, keep_BK, 1.0)


def parse_number(key: str, value: object) -> int | float:
    """A count (int) or fraction (float) from a Python, NumPy or torch number, or a zero-dimensional array.

    A float of lower precision becomes the shortest decimal that it prints as: float32's 0.7 gives 0.7. Raises
    ValueError naming `key` for anything else, including booleans, NaN and infinities.
    """
    scalar = value
    if isinstance(scalar, Tensor):
        scalar = (scalar.float() if scalar.dtype == torch.bfloat16 else scalar).detach().cpu().numpy()
    if getattr(scalar, "ndim", None) == 0:
        scalar = scalar[()]  # type: ignore[index]  # unpacks a zero-dimensional array
    if isinstance(scalar, Integral) and not isinstance(scalar, bool):
        return int(scalar)
    if isinstance(scalar, Real) and not isinstance(scalar, bool) and math.isfinite(scalar):
        return float(str(scalar)) if hasattr(scalar, "dtype") else float(scalar)
    raise ValueError(f"{key}: {value!r} is out of range, allowed: a fraction, or an int that counts tokens")


def budget(keep: float, tokens: int) -> int:
    """Number of kept tokens for `keep`: an int is a count; a float is a fraction, rounded half up.

    A fraction above 0 keeps at least one token, unless there are none. NumPy and torch numbers are accepted
    as in `parse_number`. Raises ValueError for a count outside 0..tokens or a fraction outside 0..1.
    """
    keep = parse_number("keep", keep)
    if isinstance(keep, int):
        if not 0 <= keep <= tokens:
            raise ValueError(f"keep: {keep} is out of range, allowed: a count of 0 to {tokens} tokens")
        return keep
    if not 0 <= keep <= 1:
        raise ValueError(f"keep: {keep} is out of range, allowed: a fraction 0 <= keep <= 1, or an int")
    # Decimal, because 0.145 * 100 in binary lies below 14.5 and would be rounded down.
    rounded = int((Decimal(str(keep)) * tokens).to_integral_value(ROUND_HALF_UP))
    return min(max(rounded, 1), tokens) if keep > 0 else 0


def shares(total: int, sizes: Sequence[int]) -> list[int]:
    """Split `total` over parts in proportion to their sizes, by largest remainder; ties go to the first part.

    The shares sum to `total`, and no share exceeds its part. Raises ValueError unless total is in range.
    """
    tokens = sum(sizes)
    if not 0 <= total <= tokens:
        raise ValueError(f"total: {total} is out of range, allowed: 0 <= total <= {tokens} tokens")
    if total == 0:
        return [0] * len(sizes)
    whole, rest = zip(*(divmod(total * size, tokens) for size in sizes), strict=True)
    first = sorted(range(len(sizes)), key=lambda part: -rest[part])[: total - sum(whole)]
    return [share + (part in first) for part, share in enumerate(whole)]


def sine_positions(grid: tuple[int, int], width: int) -> Tensor:
    """Fixed 2-D sine positions: half of the channels encode the row, half the column; float32 (N, width).

    Wavelengths rise geometrically from 2 pi to 20,000 pi cells. Raises ValueError unless 4 divides the width.
    """
    rows, columns = grid
    row_N, column_N = torch.arange(rows).repeat_interleave(columns), torch.arange(columns).repeat(rows)
    return torch.cat([_sine_waves(axis_N, width) for axis_N in (row_N, column_N)], dim=1)


def sine_positions_of_each(
    grids: Sequence[tuple[int, int]], width: int, device: torch.device | None = None
) -> Tensor:
    """`sine_positions` of several images, concatenated; (T, width)."""
    # Waves of a coordinate are computed once: those of all tokens would take as long as a Transformer layer.
    waves = _sine_waves(torch.arange(max(map(max, grids)), device=device), width)
    row_T = torch.cat([torch.arange(rows).repeat_interleave(columns) for rows, columns in grids])
    column_T = torch.cat([torch.arange(columns).repeat(rows) for rows, columns in grids])
    return torch.cat([waves[axis_T.to(waves.device)] for axis_T in (row_T, column_T)], dim=1)


def _sine_waves(place_X: Tensor, width: int) -> Tensor:
    """Sines, then cosines, of integer coordinates; (X, width / 2)."""
    if width % 4:
        raise ValueError(f"width: {width} cannot carry 2-D sine positions, allowed: a multiple of 4")
    exponents = torch.arange(width // 4, device=place_X.device)
    frequencies = torch.exp(exponents * (-math.log(10_000.0) / (width // 4)))
    angles = place_X[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)
