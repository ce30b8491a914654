"""How tokens are chosen: the paper's selector, its training, and the floors it is measured against."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from atr.reduction.attention import (
    ClassAttention,
    HiRED,
    HoloV,
    PruMerge,
    PruMergePlus,
    VisionZip,
    VisPruner,
)
from atr.reduction.distilled import DistilledReducer
from atr.reduction.diversity import MMR, CDPruner, Dart, DivPrune, Scope
from atr.reduction.encoded import Adaptive, Encoded, Merger, Reducer, Scorer
from atr.reduction.floors import Full, L2Norm, NoImage, PixelVariance, Random, Uniform
from atr.reduction.merging import AveragePooling, ImageDownsampling, ToMe
from atr.reduction.selector import FeatureSelector, SelectorReducer

__all__ = [
    "NEEDS",
    "REDUCERS",
    "Adaptive",
    "DistilledReducer",
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

_UNTRAINED: dict[str, Callable[[], Reducer]] = {
    "full": Full,
    "none": NoImage,
    "uniform": Uniform,
    "average-pooling": AveragePooling,
    "image-downsampling": ImageDownsampling,
    "l2-norm": L2Norm,
    "pixel-variance": PixelVariance,
    "class-attention": ClassAttention,
    "hired": HiRED,
    "prumerge": PruMerge,
    "prumerge-plus": PruMergePlus,
    "visionzip": VisionZip,
    "vispruner": VisPruner,
    "holov": HoloV,
    "divprune": DivPrune,
    "cdpruner": partial(CDPruner, text=False),
    "cdpruner-text": CDPruner,
    "dart": Dart,
    "scope": Scope,
    "mmr": MMR,
    "tome": ToMe,
    "prumerge-adaptive": PruMerge,
}


_TRAINED: dict[str, Callable[[FeatureSelector], Reducer]] = {
    "selector": SelectorReducer,
    "selector-adaptive": SelectorReducer,
    "selector-mmr": lambda selector: MMR(SelectorReducer(selector)),
    "selector-scope": lambda selector: Scope(SelectorReducer(selector)),
    "distilled": DistilledReducer,
    "distilled-ranking": SelectorReducer,
}


def _untrained(make: Callable[[], Reducer]) -> Callable[[int, str | Path], Reducer]:
    return lambda seed, selector: make()


def _trained(make: Callable[[FeatureSelector], Reducer]) -> Callable[[int, str | Path], Reducer]:
    return lambda seed, selector: make(FeatureSelector.from_pretrained(selector))


REDUCERS: dict[str, Callable[[int, str | Path], Reducer]] = {
    **{name: _untrained(make) for name, make in _UNTRAINED.items()},
    "random": lambda seed, selector: Random(seed),
    **{name: _trained(make) for name, make in _TRAINED.items()},
}
"""Reducers by name, made from a seed and the folder (or hub id) of a selector; each takes what it needs."""

NEEDS: dict[str, frozenset[str]] = {
    **{name: make().needs for name, make in _UNTRAINED.items()},
    "random": Random.needs,
    **dict.fromkeys(_TRAINED, SelectorReducer.needs),
    "distilled": DistilledReducer.needs,
}
"""What each of REDUCERS reads of the optional fields of Encoded, told without making it."""
