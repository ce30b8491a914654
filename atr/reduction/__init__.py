"""How tokens are chosen: the paper's selector, its training, and the floors it is measured against."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from atr.reduction.base import Adaptive, EncoderOutput, Merger, Reducer, Scorer
from atr.reduction.distilled import DistilledReducer
from atr.reduction.peers._attention import (
    ClassAttention,
    HiRED,
    HoloV,
    PruMerge,
    PruMergePlus,
    VisionZip,
    VisPruner,
)
from atr.reduction.peers._baselines import Full, L2Norm, NoImage, PixelVariance, Random, Uniform
from atr.reduction.peers._diversity import MMR, CDPruner, Dart, DivPrune, Scope
from atr.reduction.peers._merging import AveragePooling, ImageDownsampling, ToMe
from atr.reduction.selector import FeatureSelector, SelectorReducer

__all__ = [
    "NEEDS",
    "REDUCERS",
    "Adaptive",
    "DistilledReducer",
    "EncoderOutput",
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
    "average_pooling": AveragePooling,
    "image_downsampling": ImageDownsampling,
    "l2_norm": L2Norm,
    "pixel_variance": PixelVariance,
    "class_attention": ClassAttention,
    "hired": HiRED,
    "prumerge": PruMerge,
    "prumerge_plus": PruMergePlus,
    "visionzip": VisionZip,
    "vispruner": VisPruner,
    "holov": HoloV,
    "divprune": DivPrune,
    "cdpruner": partial(CDPruner, text=False),
    "cdpruner_text": CDPruner,
    "dart": Dart,
    "scope": Scope,
    "mmr": MMR,
    "tome": ToMe,
    "prumerge_adaptive": PruMerge,
}


_TRAINED: dict[str, Callable[[FeatureSelector], Reducer]] = {
    "selector": SelectorReducer,
    "selector_adaptive": SelectorReducer,
    "selector_mmr": lambda selector: MMR(SelectorReducer(selector)),
    "selector_scope": lambda selector: Scope(SelectorReducer(selector)),
    "distilled": DistilledReducer,
    "distilled_ranking": SelectorReducer,
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
"""What each of REDUCERS reads of the optional fields of EncoderOutput, told without making it."""
