"""How much kept tokens and answers change if deployment differs from training."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from atr.core.bootstrap import interval, resampled
from atr.core.records import Question
from atr.reduction import Full, Reducer
from atr.vlm.generation import Generator, QuestionBatch
from atr.vlm.policy import Policy
from atr.vlm.reduce import layer_of
from atr.vlm.variants import VARIANTS, Variant, after_encoding, deploy, pixel_digest

Cell = tuple[str, float]
"""A reducer by its name, and a kept fraction."""
FULL: Cell = ("full", 1.0)
"""All tokens: a change of this score is not due to the selection."""


REFERENCE = ""
"""Name of the deployment that the variants are compared with."""
ScoreAnswer = Callable[[Question, str], float]
"""Score of a prediction for a question."""


@dataclass(frozen=True)
class RobustnessSettings:
    """Kept fractions, tokens per batch, and the settings of the bootstrap (`atr.core.bootstrap`)."""

    keep: Sequence[float]
    batch_tokens: int
    resamples: int
    seed: int


@dataclass(frozen=True)
class Described:
    """An image that is shown with a prompt whose answer is not scored."""

    images: list[str]
    question: str = "Describe the image in detail."


@dataclass(frozen=True)
class ObservedQuestions:
    """What is observed of which reducers: `questions`, in batches of `tokens`, in the cells of `reducers`.

    `generator` reads images in the reference deployment; without `score` nothing is answered.
    """

    generator: Generator
    reducers: Mapping[str, Reducer]
    cells: Sequence[Cell]
    questions: Sequence[Any]
    tokens: int
    score: ScoreAnswer | None = None


@dataclass
class Observation:
    """Kept tokens and scores under one deployment; all deployments have the images in one order."""

    kept: dict[Cell, list[tuple[Tensor, int]]] = field(default_factory=dict)
    """Kept indices of each image, and its number of tokens."""
    scores: dict[Cell, dict[str, float]] = field(default_factory=dict)
    """Scores of the answers by question id."""


def first_of_each(questions: Iterable[Question], count: int) -> list[Question]:
    """The questions of the first `count` units of each benchmark whose images are all readable.

    Raises ValueError if there is none.
    """
    units: dict[str, dict[str, list[Question]]] = {}
    for question in questions:
        units.setdefault(question.benchmark, {}).setdefault(question.unit or question.id, []).append(question)
    usable = [
        [unit for unit in members.values() if all(one.images and not one.unreadable for one in unit)]
        for members in units.values()
    ]
    chosen = [question for members in usable for unit in members[:count] for question in unit]
    if not chosen:
        raise ValueError("no question has an image that can be read")
    return chosen


def robustness(
    generator: Generator,
    reducers: Mapping[str, Reducer],
    questions: Sequence[Question],
    score: ScoreAnswer,
    photographs: Generator,
    pictured: Sequence[str],
    settings: RobustnessSettings,
    with_full: bool = False,
    variants: Mapping[str, Variant] = VARIANTS,
) -> dict[str, Any]:
    """Scores in the reference deployment, and how each variant changes the kept tokens and the scores.

    `generator` reads images and answers in the reference deployment. `photographs` is a generator
    for the images `pictured`, whose answers are not scored: they are larger than the tower's input and so
    show what a resize does. `with_full` also measures the score with all tokens, without selection.
    """
    cells = [(name, keep) for name in reducers for keep in settings.keep]
    scored = [FULL, *cells] if with_full else cells
    answering = ObservedQuestions(
        generator, {FULL[0]: Full(), **reducers}, scored, questions, settings.batch_tokens, score
    )
    # Without a reducer there is no selection to look at on the photographs.
    described = [Described([name]) for name in pictured] if cells else []
    showing = ObservedQuestions(photographs, reducers, cells, described, settings.batch_tokens)
    (answered, same_pixels), (shown, _) = (observe_each(each, variants) for each in (answering, showing))
    own = answered[REFERENCE], shown[REFERENCE]
    changes = [
        {"name": name, "no_pixel_changed": name in same_pixels}
        | compare((answered[name], shown[name]), own, scored, questions, settings)
        for name in variants
    ]
    scores = {cell: mean_score(own[0].scores[cell], questions) for cell in scored}
    return {
        "keep": list(settings.keep),
        "questions": len(questions),
        "photographs": len(pictured),
        "full": scores.get(FULL),
        "reference": {name: [scores[name, keep] for keep in settings.keep] for name in reducers},
        "variants": changes,
    }


def observe_each(
    observed: ObservedQuestions, variants: Mapping[str, Variant]
) -> tuple[dict[str, Observation], Collection[str]]:
    """Observations in the reference deployment and in each variant, and the variants that change no pixel.

    Images are encoded once for all variants that change nothing before the encoder's output, and not again
    where no pixel changes.
    """
    same_pixels = variants_without_change(observed.generator, observed.questions, variants)
    together = {name: variant for name, variant in variants.items() if not variant.encodes}
    seen = observe(observed, {REFERENCE: Variant(), **together})
    for name, variant in tqdm(variants.items(), "robustness"):
        if name in same_pixels and replace(variant, image=None, processor=None) == Variant():
            seen[name] = seen[REFERENCE]
        elif variant.encodes:
            with deploy(observed.generator, variant) as changed:
                tokens = variant.batch_tokens or observed.tokens
                seen |= observe(replace(observed, generator=changed, tokens=tokens), {name: variant})
    return seen, same_pixels


def variants_without_change(
    generator: Generator, questions: Sequence[Any], variants: Mapping[str, Variant]
) -> set[str]:
    """Names of those variants of images that change no pixel which the tower reads for the questions."""
    own, names = cache(partial(pixel_digest, generator)), set()
    images = dict.fromkeys(name for question in questions for name in question.images)
    for name, variant in variants.items():
        if variant.is_of_images:
            with deploy(generator, variant) as changed:
                if all(pixel_digest(changed, image) == own(image) for image in images):
                    names.add(name)
    return names


@torch.inference_mode()
def observe(observed: ObservedQuestions, variants: Mapping[str, Variant]) -> dict[str, Observation]:
    """Kept tokens and scores in variants that share the encodings of the generator."""
    generator, cells, questions = observed.generator, observed.cells, observed.questions
    needs = frozenset().union(*(reducer.needs for reducer in observed.reducers.values()))
    layer = layer_of(generator.model, *observed.reducers.values())
    seen = {
        name: Observation({cell: [] for cell in cells}, {cell: {} for cell in cells}) for name in variants
    }
    # Those with the encoder's own features first, as reducers reuse the scores of the last features.
    in_turn = sorted(variants.items(), key=lambda item: item[1].features is not None)
    for indices in generator.batches(questions, observed.tokens):
        together = [questions[index] for index in indices]
        shown, asked = [one.images for one in together], [one.question for one in together]
        batch = generator.prepare(shown, asked, needs, layer)
        for name, variant in in_turn:
            changed, changed_batch = after_encoding(generator, batch, variant)
            _observe_batch(
                seen[name], replace(observed, generator=changed, questions=together), changed_batch
            )
    return seen


def _observe_batch(seen: Observation, observed: ObservedQuestions, batch: QuestionBatch) -> None:
    for name, keep in observed.cells:
        reducer = observed.reducers[name]
        seen.kept[name, keep] += _kept(observed.generator, batch, reducer, keep)
        if observed.score:
            replies = observed.generator.answer(batch, reducer, keep)
            pairs = zip(observed.questions, replies, strict=True)
            seen.scores[name, keep] |= {one.id: observed.score(one, reply[0]) for one, reply in pairs}


def _kept(
    generator: Generator, batch: QuestionBatch, reducer: Reducer, keep: float
) -> list[tuple[Tensor, int]]:
    whole, settings = batch.whole, generator.settings
    assert whole is not None
    whole = whole.with_text() if "text_BD" in reducer.needs else whole
    kept = whole.choose(reducer, Policy(keep, settings.positions, settings.budget, settings.newline))
    return [(kept[image], whole.layout.sizes[image]) for image in whole.image_of]


def compare(
    seen: tuple[Observation, Observation],
    reference: tuple[Observation, Observation],
    cells: Sequence[Cell],
    questions: Sequence[Question],
    settings: RobustnessSettings,
) -> dict[str, Any]:
    """What a deployment changes on the questions and on the photographs, by reducer and kept fraction."""
    (answered, pictured), (own, own_pictured) = seen, reference
    changes = {cell: change(answered.scores[cell], own.scores[cell], questions, settings) for cell in cells}
    lines: dict[str, dict[str, list[Any]]] = {}
    for cell in cells:
        if cell == FULL:
            continue
        overlap, photographs = overlaps(answered, own, cell), overlaps(pictured, own_pictured, cell)
        line = {"iou": overlap, "photographs": photographs, "change": changes[cell]}
        for key, value in line.items():
            lines.setdefault(cell[0], {}).setdefault(key, []).append(value)
    return {"full": changes.get(FULL), "reducers": lines}


def robustness_curves(measured: Mapping[str, Any]) -> Iterator[tuple[float, dict[str, float]]]:
    """For each kept fraction the mean overlaps, by "reducer/variant"."""
    lines = {
        f"{name}/{variant['name']}": line["iou"]
        for variant in measured["variants"]
        for name, line in variant["reducers"].items()
    }
    for place, keep in enumerate(measured["keep"]):
        yield keep, {name: line[place]["mean"] for name, line in lines.items() if line[place]}


def overlaps(seen: Observation, reference: Observation, cell: Cell) -> dict[str, float] | None:
    """Mean and lowest intersection over union of the tokens kept of an image.

    Images whose number of tokens changed, because they were cut into other tiles, are left out; None if no
    image remains.
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
    settings: RobustnessSettings,
) -> dict[str, float]:
    """Rise of the mean score over the benchmarks, with the paired 95 % interval over questions."""
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
    """The units of each benchmark, each as the ids of its questions."""
    units: dict[str, dict[str, list[str]]] = {}
    for question in questions:
        unit = units.setdefault(question.benchmark, {}).setdefault(question.unit or question.id, [])
        unit.append(question.id)
    return {benchmark: list(members.values()) for benchmark, members in units.items()}


def _lowest(unit: Sequence[str], scores: Mapping[str, float]) -> float:
    return min(scores[name] for name in unit)
