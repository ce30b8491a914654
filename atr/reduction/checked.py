"""Reducers asked, with what they are given and what they answer checked once for all of them."""

import torch
from torch import Tensor

from atr.core.finite import check_finite
from atr.reduction import NEEDS
from atr.reduction.base import EncoderOutput, Merger, Reducer, Scorer
from atr.reduction.peers._baselines import NoImage


def ask(reducer: Reducer, encoded: EncoderOutput, budget: int) -> Tensor:
    """Indices that a reducer keeps of each image, exactly `budget` in raster order; keep_BK.

    Raises ValueError for a reducer that needs what was not encoded (naming those of REDUCERS that do not), a
    budget outside 1 to N (0 is NoImage's alone), and NaN or infinity in what it would read.
    """
    check(reducer, encoded)
    _check_budget(reducer, encoded, budget)
    return _exact(reducer, encoded, budget, reducer(encoded, budget))


def ask_merged(merger: Merger, encoded: EncoderOutput, budget: int) -> tuple[Tensor, Tensor]:
    """As `ask`, and the features (B, K, D) that a merger puts there; ValueError if they are not finite."""
    check(merger, encoded)
    _check_budget(merger, encoded, budget)
    keep_BK, merged_BKD = merger.merge(encoded, budget)
    check_finite(merged_BKD, f"reducer {type(merger).__name__}: merged features")
    features_BND = encoded.features_BND
    shape = (len(features_BND), budget, features_BND.shape[2])
    assert merged_BKD.shape == shape, f"{merger} merged to {tuple(merged_BKD.shape)}, asked for {shape}"
    assert merged_BKD.dtype == features_BND.dtype, f"{merger} made {merged_BKD.dtype} of {features_BND.dtype}"
    return _exact(merger, encoded, budget, keep_BK), merged_BKD


def check(reducer: Reducer, encoded: EncoderOutput) -> None:
    """Raise ValueError for a reducer that needs what was not encoded, or would read NaN or infinity."""
    name = type(reducer).__name__
    if absent := _missing(reducer.needs, encoded):
        able = [other for other, needs in NEEDS.items() if not _missing(needs, encoded)]
        raise ValueError(
            f"reducer {name} needs {', '.join(absent)}, which was not encoded, allowed: {', '.join(able)}"
        )
    for field in ("features_BND", *sorted(reducer.needs)):
        if isinstance(value := getattr(encoded, field), Tensor):
            check_finite(value, f"reducer {name}: {field}")


def ask_scores(scorer: Scorer, encoded: EncoderOutput) -> Tensor:
    """A reducer's scores of all tokens, scores_BN; raises ValueError as `check` and unless all are finite."""
    check(scorer, encoded)
    scores_BN = scorer.scores(encoded)
    check_finite(scores_BN, f"reducer {type(scorer).__name__}: scores")
    return scores_BN


def _missing(needs: frozenset[str], encoded: EncoderOutput) -> list[str]:
    return sorted(field for field in needs if getattr(encoded, field) is None)


def _check_budget(reducer: Reducer, encoded: EncoderOutput, budget: int) -> None:
    least = 0 if isinstance(reducer, NoImage) else 1
    if not least <= budget <= encoded.tokens:
        raise ValueError(
            f"reducer {type(reducer).__name__}: budget {budget} is out of range, allowed: {least} to "
            f"{encoded.tokens} tokens"
        )


def _exact(reducer: Reducer, encoded: EncoderOutput, budget: int, keep_BK: Tensor) -> Tensor:
    asked = (len(encoded.features_BND), budget)
    assert keep_BK.shape == asked, f"{reducer} kept {tuple(keep_BK.shape)}, asked for {asked}"
    assert keep_BK.dtype == torch.int64, f"{reducer} kept {keep_BK.dtype}, asked for int64"
    assert (keep_BK.diff(dim=1) > 0).all(), f"{reducer} kept a token twice, or out of raster order"
    inside_BK = (keep_BK >= 0) & (keep_BK < encoded.tokens)
    assert inside_BK.all(), f"{reducer} kept a token that is none of {encoded.tokens}"
    return keep_BK
