"""Calls reducers and checks their inputs and outputs, in one place for all reducers."""

import torch
from torch import Tensor

from atr.core.finite import check_finite
from atr.reduction import registry
from atr.reduction.base import EncoderOutput, Merger, Reducer, Scorer
from atr.reduction.layer_schedule import LayerReducer
from atr.reduction.limits import NoImage


def select(reducer: Reducer, encoded: EncoderOutput, budget: int) -> Tensor:
    """Indices that a reducer keeps of each image, exactly `budget` in raster order; keep_BK.

    Raises a one-line ValueError naming the reducer for fields it needs that were not encoded, a budget
    outside 1 to N (0 is allowed for NoImage alone), NaN or infinity in its inputs, and a selection that
    breaks the contract of `Reducer`: wrong count or dtype, duplicates, out of order or out of range.
    """
    check_fields(reducer, encoded)
    _check_budget(reducer, encoded, budget)
    keep_BK = reducer(encoded, budget)
    _check_selection(reducer, encoded, budget, keep_BK)
    return keep_BK


def select_merged(merger: Merger, encoded: EncoderOutput, budget: int) -> tuple[Tensor, Tensor]:
    """As `select`, with the merged features (B, K, D), which must be finite and of the features' dtype."""
    check_fields(merger, encoded)
    _check_budget(merger, encoded, budget)
    keep_BK, merged_BKD = merger.merge(encoded, budget)
    _check_selection(merger, encoded, budget, keep_BK)
    batch, _, width = encoded.features_BND.shape
    _check_tensor(merger, "merged features", merged_BKD, (batch, budget, width), encoded.features_BND.dtype)
    check_finite(merged_BKD, f"reducer {_name(merger)}: merged features")
    return keep_BK, merged_BKD


def select_scores(scorer: Scorer, encoded: EncoderOutput) -> Tensor:
    """Finite scores of all tokens, scores_BN; raises ValueError as `check_fields` and for other scores."""
    check_fields(scorer, encoded)
    scores_BN = scorer.scores(encoded)
    _check_tensor(scorer, "scores", scores_BN, tuple(encoded.features_BND.shape[:2]))
    check_finite(scores_BN, f"reducer {_name(scorer)}: scores")
    return scores_BN


def check_fields(reducer: Reducer, encoded: EncoderOutput) -> None:
    """Raise ValueError if a field that a reducer needs was not encoded, or contains NaN or infinity."""
    if missing := _missing(reducer.needs, encoded):
        raise ValueError(
            f"reducer {_name(reducer)} needs {', '.join(missing)}, which was not encoded, allowed: "
            f"{', '.join(_served_by(encoded))}"
        )
    for field in ("features_BND", *sorted(reducer.needs)):
        if isinstance(value := getattr(encoded, field), Tensor):
            check_finite(value, f"reducer {_name(reducer)}: {field}")


def _served_by(encoded: EncoderOutput) -> list[str]:
    """Built-in reducers that need no more than was encoded."""
    reducers = {
        name: registry.build_reducer(name, 0, registry.placeholder()) for name in registry.built_in_names()
    }
    return [
        name
        for name, reducer in reducers.items()
        if not isinstance(reducer, LayerReducer) and not _missing(reducer.needs, encoded)
    ]


def _missing(needs: frozenset[str], encoded: EncoderOutput) -> list[str]:
    return sorted(field for field in needs if getattr(encoded, field) is None)


def _check_budget(reducer: Reducer, encoded: EncoderOutput, budget: int) -> None:
    least = 0 if isinstance(reducer, NoImage) else 1
    if not least <= budget <= encoded.tokens:
        raise ValueError(
            f"reducer {_name(reducer)}: budget {budget} is out of range, allowed: {least} to "
            f"{encoded.tokens} tokens"
        )


def _check_selection(reducer: Reducer, encoded: EncoderOutput, budget: int, keep_BK: Tensor) -> None:
    _check_tensor(reducer, "kept indices", keep_BK, (len(encoded.features_BND), budget), torch.int64)
    steps_BK = keep_BK.diff(dim=1)
    if (steps_BK == 0).any():
        raise ValueError(f"reducer {_name(reducer)}: a token is kept twice, allowed: distinct tokens")
    if (steps_BK < 0).any():
        raise ValueError(f"reducer {_name(reducer)}: kept indices are out of order, allowed: raster order")
    if ((keep_BK < 0) | (keep_BK >= encoded.tokens)).any():
        outside = keep_BK[(keep_BK < 0) | (keep_BK >= encoded.tokens)][0].item()
        raise ValueError(
            f"reducer {_name(reducer)}: kept index {outside} is out of range, allowed: 0 to "
            f"{encoded.tokens - 1}"
        )


def _check_tensor(
    reducer: Reducer, what: str, values: object, shape: tuple[int, ...], dtype: torch.dtype | None = None
) -> None:
    where = f"reducer {_name(reducer)}: {what}"
    if not isinstance(values, Tensor):
        raise ValueError(f"{where} are of type {type(values).__name__}, allowed: a tensor of shape {shape}")
    if values.shape != shape:
        raise ValueError(f"{where} have shape {tuple(values.shape)}, allowed: {shape}")
    if dtype is not None and values.dtype != dtype:
        raise ValueError(f"{where} are {values.dtype}, allowed: {dtype}")


def _name(reducer: object) -> str:
    return type(reducer).__name__
