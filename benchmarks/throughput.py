"""Questions per second of our evaluation and of lmms-eval's `llava_hf`, on the same weights and prompts.

Both answer the same questions about the same images with all visual tokens, in float32, with answers of a
fixed length, in turns in one process. lmms-eval's class is called as lmms-eval calls it, and answers one
question at a time, the only batch size that it has. Answers that are equal are counted.
Runs in the environment of `make test-lmms-eval`:

    .venv-lmms-eval/bin/python -m benchmarks.throughput
"""

import tempfile
from argparse import ArgumentParser
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from statistics import median
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

from atr.core.records import Question
from atr.core.timing import device_name
from atr.reduction.registry import build_reducer
from atr.vlm.checkpoint import load_vlm
from atr.vlm.generation import Generator
from atr.vlm.inputs import ImageInputs
from benchmarks.random_llava import WORDS, write_random_llava
from benchmarks.timing import Seconds, alternate, ratio_text, time_call

SIDES = {"llava": 336, "llava_next": 800}
"""Sides in pixels of the images of each family: 576 and 2,928 visual tokens."""
AnswerAll = Callable[[Sequence[Question]], list[str]]
TASK, SPLIT = "random", "test"
SETTINGS = SimpleNamespace(
    positions="original", budget="image", newline="keep", interpolation="model", share_prefix=True,
    batch_tokens=20_000, max_new_tokens=8,
)  # fmt: skip


@dataclass(frozen=True)
class Images:
    """Images by name."""

    images: Mapping[str, Image.Image]

    def image(self, name: str) -> Image.Image:
        """One image, RGB."""
        return self.images[name]


def draw_questions(images: int, per_image: int, side: int) -> tuple[Images, list[Question]]:
    """Images of random pixels, and questions of 4 to 12 random words about each."""
    draw, noise = Random(0), np.random.default_rng(0)
    pixels = noise.integers(0, 256, (images, side, side, 3), dtype=np.uint8)
    named = {f"{index}": Image.fromarray(image) for index, image in enumerate(pixels)}
    texts = (" ".join(draw.choices(WORDS, k=draw.randint(4, 12))) for _ in range(images * per_image))
    questions = [
        Question(f"{name}#{number}", TASK, "text", [name], next(texts), answers=["none"])
        for name in named
        for number in range(per_image)
    ]
    return Images(named), questions


def our_side(folder: Path, images: Images) -> AnswerAll:
    """Answers as stage evaluate computes them from images, with the reducer `full`."""
    model, processor = load_vlm(str(folder), torch.float32)
    source = ImageInputs(model, processor, images, SETTINGS.interpolation)
    generator = Generator(model, processor, source, SETTINGS)  # type: ignore[arg-type]

    def answer(questions: Sequence[Question]) -> list[str]:
        predictions = [""] * len(questions)
        for batch in generator.batches(questions, SETTINGS.batch_tokens):
            asked = [questions[place] for place in batch]
            prepared = generator.prepare([one.images for one in asked], [one.question for one in asked])
            replies = generator.answer(prepared, build_reducer("full"), 1.0)
            for place, reply in zip(batch, replies, strict=True):
                predictions[place] = reply.prediction
        return predictions

    return answer


def their_side(folder: Path, images: Images) -> AnswerAll:
    """Answers of lmms-eval's class, which is given the requests of a task."""
    from lmms_eval.api.instance import Instance
    from lmms_eval.models.simple.llava_hf import LlavaHf

    theirs = LlavaHf(pretrained=str(folder), device="cpu", device_map="cpu", dtype="float32")

    def answer(questions: Sequence[Question]) -> list[str]:
        theirs.task_dict = {TASK: {SPLIT: questions}}
        requests = [
            Instance(
                request_type="generate_until",
                arguments=(
                    question.question,
                    {"max_new_tokens": SETTINGS.max_new_tokens},
                    lambda document: [images.image(document.images[0])],
                    number,
                    TASK,
                    SPLIT,
                ),
                idx=0,
                metadata={"task": TASK, "doc_id": number, "repeats": 1},
            )
            for number, question in enumerate(questions)
        ]
        return [text.strip() for text in theirs.generate_until(requests)]

    return answer


def compare(
    family: str, per_image: Sequence[int], questions: int, rounds: int, width: int, layers: int
) -> None:
    """Print a row for each number of questions per image."""
    with tempfile.TemporaryDirectory() as name:
        parameters = write_random_llava(Path(name), family, width, layers)
        print(f"{family}, language model of {parameters / 1e6:.1f}M parameters")
        images, _ = draw_questions(questions, 1, SIDES[family])
        sides = our_side(Path(name), images), their_side(Path(name), images)
        for count in per_image:
            _, asked = draw_questions(max(1, questions // count), count, SIDES[family])
            print(f"{count:>4} per image: {compare_sides(sides, asked, rounds)}", flush=True)


def compare_sides(sides: tuple[AnswerAll, AnswerAll], asked: Sequence[Question], rounds: int) -> str:
    """Questions per second of both sides, how many times as many are ours, and how many answers are equal."""
    answers = [side(asked[:1]) for side in sides]  # the warm-up

    def ask(number: int) -> Seconds:
        def ask_all() -> None:
            answers[number] = sides[number](asked)

        return time_call(ask_all)

    measured = alternate([partial(ask, number) for number in range(len(sides))], rounds)
    rates = " / ".join(f"{len(asked) / median(seconds.wall for seconds in side):.3f}" for side in measured)
    equal = sum(our == their for our, their in zip(*answers, strict=True))
    return f"{rates} questions/s = {ratio_text(*reversed(measured))}; {equal} of {len(asked)} answers equal"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one row per model family and number of questions per image."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--families", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--per-image", nargs="+", type=int, default=[1, 5, 30], help="questions per image")
    parser.add_argument("--questions", type=int, default=5, help="questions of a round, at least")
    parser.add_argument("--rounds", type=int, default=3, help="times that each side answers all questions")
    parser.add_argument("--width", type=int, default=512, help="of the language model, a multiple of 64")
    parser.add_argument("--layers", type=int, default=10, help="of the language model")
    options = parser.parse_args(arguments)
    print(device_name(torch.device("cpu")))
    for family in options.families:
        compare(family, options.per_image, options.questions, options.rounds, options.width, options.layers)


if __name__ == "__main__":
    main()
