"""How much the kept tokens, and the answers from them, change where deployment differs from training."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from atr.config import PROMPTS
from atr.core.bootstrap import interval, resampled
from atr.reduction import Full, Reducer
from atr.reduction.layer_schedule import LayerReducer
from atr.vlm.generation import Asked, Batch, Generator
from atr.vlm.policy import Policy
from atr.vlm.variants import VARIANTS, Variant, deployed

Cell = tuple[str, float]
"""A reducer by its name, and a kept fraction."""
FULL: Cell = ("full", 1.0)
"""All tokens: what changes here does so whatever is selected."""


class Question(Asked, Protocol):
    """What is read of a question that has a right answer."""

    @property
    def id(self) -> str:
        """Name of the question."""

    @property
    def benchmark(self) -> str:
        """Name of its benchmark."""

    @property
    def unit(self) -> str:
        """Name shared by the questions that count only together; empty if it counts alone."""

    @property
    def unreadable(self) -> str:
        """Why its images could not be read, empty if they could."""


Score = Callable[[Any, str], float]
"""Of a question and the prediction for it."""


@dataclass(frozen=True)
class Settings:
    """What is compared: kept fractions, the questions at a time, and the bootstrap of `atr.core.bootstrap`."""

    keep: Sequence[float]
    batch_size: int
    resamples: int
    seed: int


@dataclass(frozen=True)
class _Described:
    """An image of which no answer is asked."""

    images: list[str]
    question: str = PROMPTS[0]


@dataclass
class Seen:
    """What one deployment saw, kept and answered, image by image in an order that does not depend on it."""

    pixels: Any = field(default_factory=hashlib.sha256)
    kept: dict[Cell, list[tuple[Tensor, int]]] = field(default_factory=dict)
    """Indices of the tokens kept of each image, and of how many."""
    scores: dict[Cell, dict[str, float]] = field(default_factory=dict)
    """Scores of the answers by the name of the question."""


def first_of_each(questions: Iterable[Question], count: int) -> list[Question]:
    """The first `count` units of each benchmark whose questions all have images to be read.

    Raises ValueError if there is none.
    """
    units: dict[str, dict[str, list[Question]]] = {}
    for question in questions:
        units.setdefault(question.benchmark, {}).setdefault(question.unit or question.id, []).append(question)
    usable = [
        [asked for asked in members.values() if all(one.images and not one.unreadable for one in asked)]
        for members in units.values()
    ]
    chosen = [question for members in usable for asked in members[:count] for question in asked]
    if not chosen:
        raise ValueError("no question has an image that can be read")
    return chosen


def make(
    answerer: Generator, names: Iterable[str], weights: Callable[[str], str | Path]
) -> tuple[dict[str, Reducer], dict[str, str]]:
    """Reducers of these names but `random`, which is no choice, and why others are left out.

    `weights` gives the folder of the selector that one is made of; errors as in `Generator.reducer`.
    """
    reducers: dict[str, Reducer] = {}
    left_out: dict[str, str] = {}
    for name in names:
        if name == "random":
            continue
        reducer = answerer.reducer(name, 0, weights(name))
        if isinstance(reducer, LayerReducer):
            left_out[name] = "chooses between the layers of a language model"
        else:
            reducers[name] = reducer
    return reducers, left_out


def robustness(
    answerer: Generator,
    reducers: Mapping[str, Reducer],
    questions: Sequence[Question],
    score: Score,
    photographs: Generator,
    pictured: Sequence[str],
    settings: Settings,
    variants: Mapping[str, Variant] = VARIANTS,
) -> dict[str, Any]:
    """The reference's scores, and what each variant changes of the kept tokens and of the scores.

    `answerer` reads images and answers in the reference deployment. `photographs` is the same on the images
    `pictured`, of which no answer is asked: larger than the tower's, they show what a resize changes.
    """
    described = [_Described([name]) for name in pictured]
    cells = [(name, keep) for name in reducers for keep in settings.keep]
    everything = {FULL[0]: Full(), **reducers}

    def see(variant: Variant) -> tuple[Seen, Seen]:
        size = variant.batch or settings.batch_size
        with deployed(answerer, variant) as changed:
            asked = observe(changed, everything, [FULL, *cells], questions, size, score)
        with deployed(photographs, variant) as changed:
            return asked, observe(changed, reducers, cells, described, size)

    reference = see(Variant())
    found = []
    for name, variant in tqdm(variants.items(), "robustness"):
        seen = see(variant)
        same = variant.is_of_images and seen[0].pixels.digest() == reference[0].pixels.digest()
        changes = compare(seen, reference, cells, questions, settings)
        found.append({"name": name, "no_pixel_changed": same, **changes})
    scores = {cell: mean_score(reference[0].scores[cell], questions) for cell in [FULL, *cells]}
    return {
        "keep": list(settings.keep),
        "questions": len(questions),
        "photographs": len(pictured),
        "full": scores[FULL],
        "reference": {name: [scores[name, keep] for keep in settings.keep] for name in reducers},
        "variants": found,
    }


@torch.inference_mode()
def observe(
    answerer: Generator,
    reducers: Mapping[str, Reducer],
    cells: Sequence[Cell],
    questions: Sequence[Any],
    size: int,
    score: Score | None = None,
) -> Seen:
    """The kept tokens of all images under each cell, `size` questions at a time, and the answers' scores."""
    needs = frozenset().union(*(reducer.needs for reducer in reducers.values()))
    seen = Seen(kept={cell: [] for cell in cells}, scores={cell: {} for cell in cells})
    for indices in answerer.batches(questions, size):
        asked = [questions[index] for index in indices]
        batch = answerer.prepare([one.images for one in asked], [one.question for one in asked], needs)
        assert batch.whole is not None and batch.whole.encoded.image_key_BX is not None, (
            "questions have images"
        )
        seen.pixels.update(batch.whole.encoded.image_key_BX.cpu().numpy().tobytes())
        for name, keep in cells:
            seen.kept[name, keep] += _kept(answerer, batch, reducers[name], keep)
            if score:
                replies = answerer.answer(batch, reducers[name], keep)
                scored = zip(asked, replies, strict=True)
                seen.scores[name, keep] |= {one.id: score(one, reply[0]) for one, reply in scored}
    return seen


def _kept(answerer: Generator, batch: Batch, reducer: Reducer, keep: float) -> list[tuple[Tensor, int]]:
    whole, asked = batch.whole, answerer.settings
    assert whole is not None
    whole = whole.asked() if "text_BD" in reducer.needs else whole
    kept = whole.choose(reducer, Policy(keep, asked.positions, asked.budget, asked.newline))
    return list(zip(kept, whole.packing.sizes, strict=True))


def compare(
    seen: tuple[Seen, Seen],
    reference: tuple[Seen, Seen],
    cells: Sequence[Cell],
    questions: Sequence[Question],
    settings: Settings,
) -> dict[str, Any]:
    """What a deployment changes, of the questions and of the photographs, by reducer and kept fraction."""
    (asked, pictured), (own, own_pictured) = seen, reference
    changes = {
        cell: change(asked.scores[cell], own.scores[cell], questions, settings) for cell in [FULL, *cells]
    }
    lines: dict[str, dict[str, list[Any]]] = {}
    for cell in cells:
        overlap, photographs = overlaps(asked, own, cell), overlaps(pictured, own_pictured, cell)
        line = {"iou": overlap, "photographs": photographs, "change": changes[cell]}
        for key, value in line.items():
            lines.setdefault(cell[0], {}).setdefault(key, []).append(value)
    return {"full": changes[FULL], "reducers": lines}


def curves(found: Mapping[str, Any]) -> Iterator[tuple[float, dict[str, float]]]:
    """For each kept fraction the mean overlaps that `robustness` found, named "reducer/variant"."""
    lines = {
        f"{name}/{variant['name']}": line["iou"]
        for variant in found["variants"]
        for name, line in variant["reducers"].items()
    }
    for place, keep in enumerate(found["keep"]):
        yield keep, {name: line[place]["mean"] for name, line in lines.items() if line[place]}


def overlaps(seen: Seen, reference: Seen, cell: Cell) -> dict[str, float] | None:
    """Mean and lowest intersection over union of the tokens kept of an image.

    Images that come in another number of tokens, cut into other tiles, cannot be compared; None if none can.
    """
    ratios = [
        _iou(kept_K, own_K)
        for (kept_K, of), (own_K, own_of) in zip(seen.kept[cell], reference.kept[cell], strict=True)
        if of == own_of
    ]
    return {"mean": fmean(ratios), "lowest": min(ratios)} if ratios else None


def _iou(one_K: Tensor, other_K: Tensor) -> float:
    one, other = set(one_K.tolist()), set(other_K.tolist())
    return len(one & other) / len(one | other)


def change(
    scores: Mapping[str, float],
    reference: Mapping[str, float],
    questions: Sequence[Question],
    settings: Settings,
) -> dict[str, float]:
    """By how much the mean score over the benchmarks rises, with the paired 95 % interval over questions."""
    means, resamples = [], []
    for benchmark, units in _units(questions).items():
        change_U = np.array([_lowest(unit, scores) - _lowest(unit, reference) for unit in units])
        means.append(float(change_U.mean()))
        resamples.append(resampled(change_U, benchmark, settings.resamples, settings.seed))
    low, high = interval(np.mean(resamples, axis=0))
    return {"mean": fmean(means), "low": low, "high": high}


def mean_score(scores: Mapping[str, float], questions: Sequence[Question]) -> float:
    """Mean over the benchmarks of the mean over their units."""
    return fmean(fmean(_lowest(unit, scores) for unit in units) for units in _units(questions).values())


def _units(questions: Sequence[Question]) -> dict[str, list[list[str]]]:
    """For each benchmark its units, each the names of its questions."""
    units: dict[str, dict[str, list[str]]] = {}
    for question in questions:
        unit = units.setdefault(question.benchmark, {}).setdefault(question.unit or question.id, [])
        unit.append(question.id)
    return {benchmark: list(members.values()) for benchmark, members in units.items()}


def _lowest(unit: Sequence[str], scores: Mapping[str, float]) -> float:
    return min(scores[name] for name in unit)
