"""The questions to evaluate with, each with its images: drawn by a module, or read from a dataset."""

import hashlib
import random
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import NamedTuple

from PIL import Image

from atr.core.records import Example, Question
from atr.core.typed_json import check_distinct, parse_record, short
from atr.datasets.decoding import decode
from atr.datasets.drawn import DrawnImage
from atr.datasets.parquet import ImageCell


class EvaluationImage(NamedTuple):
    """An image of a question."""

    id: str
    image: Image.Image
    text_centres: list[tuple[float, float]]
    """Centre (x, y) of each written character, as fractions of the sides; known only of drawn images."""


Pictured = tuple[Question, list[EvaluationImage]]
"""A question with its images."""


def first_questions(
    benchmark: str, group: str, examples: Iterable[Example], count: int
) -> Iterator[Pictured]:
    """The first `count` examples as questions with their images; for drawn examples, which are endless."""
    return (_with_images(benchmark, group, example) for example in islice(examples, count))


def sample_questions(
    benchmark: str, group: str, examples: Iterable[Example], count: int, seed: int
) -> Iterator[Pictured]:
    """Questions of a seeded sample of `count` units, in the benchmark's order; all if there are fewer.

    Raises ValueError naming an example whose id occurs twice, or whose texts are not allowed.
    """
    everything = list(examples)
    check_distinct(f"{benchmark}: ids of examples", [example.id for example in everything])
    units = list(dict.fromkeys(example.unit or example.id for example in everything))
    chosen = set(random.Random(seed).sample(units, min(count, len(units))))
    for example in everything:
        if (example.unit or example.id) in chosen:
            yield _with_images(benchmark, group, example)


def _with_images(benchmark: str, group: str, example: Example) -> Pictured:
    """A question with its images; if one cannot be read, without images and with the reason."""
    images, unreadable = [], ""
    if wrong := [image for image in example.images if not isinstance(image, DrawnImage | ImageCell)]:
        where = f"{benchmark}: images of example {short(example.id)}"
        raise ValueError(f"{where}: {short(wrong[0])} is not allowed, allowed: images of a row")
    try:
        images = [_read(benchmark, image) for image in example.images]
    except ValueError as error:
        unreadable = str(error)
    question = {
        "id": f"{benchmark}/{example.id}",
        "benchmark": benchmark,
        "group": group,
        "images": [image.id for image in images],
        "question": example.question,
        "answers": example.answers,
        "choices": example.choices,
        "unit": example.unit and f"{benchmark}/{example.unit}",
        "unreadable": unreadable,
    }
    return parse_record(Question, question, f"question {question['id']}"), images


def _read(benchmark: str, image: DrawnImage | ImageCell) -> EvaluationImage:
    """Decode an image; one of a dataset is named by its content hash, as questions may share it."""
    if isinstance(image, DrawnImage):
        return EvaluationImage(f"{benchmark}/{image.name}", image.image, image.text_centres)
    content = image.read()
    name = f"{benchmark}/{hashlib.sha256(content).hexdigest()[:16]}"
    return EvaluationImage(name, decode(content, str(image)), [])


def deduplicate(pictured: Iterable[Pictured], questions: list[Question]) -> Iterator[EvaluationImage]:
    """Yield each distinct image once; the questions are appended to `questions` on the way."""
    seen = set()
    for question, images in pictured:  # one at a time, as the images do not all fit into memory
        questions.append(question)
        for image in images:
            if image.id not in seen:
                seen.add(image.id)
                yield image


def unreadable_questions(questions: Iterable[Question]) -> list[Question]:
    """The questions whose images cannot be read; raises ValueError if a benchmark has no other ones."""
    benchmarks: dict[str, list[Question]] = {}
    for question in questions:
        benchmarks.setdefault(question.benchmark, []).append(question)
    for benchmark, members in benchmarks.items():
        if all(question.unreadable for question in members):
            raise ValueError(f"{benchmark}: no image can be read: {members[0].unreadable}")
    return [question for members in benchmarks.values() for question in members if question.unreadable]
