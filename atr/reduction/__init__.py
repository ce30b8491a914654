"""How tokens are chosen: the paper's selector, its training, and the floors it is measured against."""

from collections.abc import Callable
from pathlib import Path

from atr.reduction.encoded import Adaptive, Encoded, Merger, Reducer, Scorer
from atr.reduction.floors import Full, NoImage, Random
from atr.reduction.selector import FeatureSelector, SelectorReducer

__all__ = [
    "REDUCERS",
    "Adaptive",
    "Encoded",
    "FeatureSelector",
    "Full",
    "Merger",
    "NoImage",
    "Random",
    "Reducer",
    "Scorer",
    "SelectorReducer",
]

REDUCERS: dict[str, Callable[[int, str | Path], Reducer]] = {
    "full": lambda seed, selector: Full(),
    "none": lambda seed, selector: NoImage(),
    "random": lambda seed, selector: Random(seed),
    "selector": lambda seed, selector: SelectorReducer(FeatureSelector.from_pretrained(selector)),
}
"""Reducers by name, made from a seed and the folder (or hub id) of a selector; each takes what it needs."""
