"""The questions to evaluate with, each with its pictures: drawn by the micro world, or from a dataset."""

import hashlib
import random
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

from PIL import Image

from atr.core.records import Example, Question
from atr.core.typed_json import check_distinct, parse_record
from atr.datasets.decoding import decode
from atr.micro import world

Drawn = tuple[Question, list[tuple[str, Image.Image]]]
"""A question, and its images by name."""


def drawn_by_micro(benchmark: str, group: str, count: int, seed: int, split: str) -> Iterator[Drawn]:
    """One question an image, so that the questions of a benchmark are independent of each other."""
    for index in range(count):
        sample = world.sample(benchmark, split, index, seed)
        question, answer = sample.turns[0]
        image = f"{benchmark}/{index:06d}"
        yield Question(f"{image}#0", benchmark, group, [image], question, [answer]), [(image, sample.image)]


def text_centres(image: str, seed: int, split: str) -> list[tuple[float, float]]:
    """Centre (x, y) of each character on an image that `drawn_by_micro` drew, in fractions of its sides.

    It is drawn again; nothing is known of an image from elsewhere.
    """
    benchmark, _, index = image.partition("/")
    if benchmark not in world.DRAW or not index.isdecimal():
        return []
    written = world.sample(benchmark, split, int(index), seed).characters
    return [(character.x / world.SIZE, character.y / world.SIZE) for character in written]


def read_from(
    benchmark: str, group: str, examples: Iterable[Example], count: int, seed: int
) -> Iterator[Drawn]:
    """A seeded sample of `count` units of a benchmark, in its order, or all if it has fewer.

    An image is named after its content, as many questions share one. A question whose images cannot be read
    has none, and says why. Raises ValueError naming a question that comes twice, or whose texts are none.
    """
    for example in _sampled(examples, count, seed):
        pictures, unreadable = [], ""
        try:
            pictures = [_picture(benchmark, cell) for cell in example.images]
        except ValueError as error:
            unreadable = str(error)
        question = Question(
            id=f"{benchmark}/{example.id}",
            benchmark=benchmark,
            group=group,
            images=[name for name, _ in pictures],
            question=example.question,
            answers=example.answers,
            choices=example.choices,
            unit=example.unit and f"{benchmark}/{example.unit}",
            unreadable=unreadable,
        )
        yield parse_record(Question, asdict(question), f"question {question.id}"), pictures


def _sampled(examples: Iterable[Example], count: int, seed: int) -> Iterator[Example]:
    everything = list(examples)
    check_distinct("ids of questions", [example.id for example in everything])
    units = list(dict.fromkeys(example.unit or example.id for example in everything))
    chosen = set(random.Random(seed).sample(units, min(count, len(units))))
    return (example for example in everything if (example.unit or example.id) in chosen)


def _picture(benchmark: str, cell: Any) -> tuple[str, Image.Image]:
    content = cell.read()
    return f"{benchmark}/{hashlib.sha256(content).hexdigest()[:16]}", decode(content, str(cell))


def distinct(drawn: Iterable[Drawn], questions: list[Question]) -> Iterator[tuple[str, Image.Image]]:
    """Each distinct picture once; the questions are gathered on the way, as no memory holds all pictures."""
    seen = set()
    for question, pictures in drawn:
        questions.append(question)
        for name, picture in pictures:
            if name not in seen:
                seen.add(name)
                yield name, picture


def unreadable(questions: Iterable[Question]) -> list[Question]:
    """The questions whose images cannot be read; raises ValueError if these are all of a benchmark."""
    benchmarks: dict[str, list[Question]] = {}
    for question in questions:
        benchmarks.setdefault(question.benchmark, []).append(question)
    for benchmark, asked in benchmarks.items():
        if all(question.unreadable for question in asked):
            raise ValueError(f"{benchmark}: no image can be read: {asked[0].unreadable}")
    return [question for asked in benchmarks.values() for question in asked if question.unreadable]
