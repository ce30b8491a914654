"""What it saves to read an image once for all questions about it, and which answers change.

- speed: questions per second of a random language model of 30 million parameters in float32, for several
  questions about each image: all in one batch with the image read once, relative to one prompt after the
  other by transformers' `generate`;
- answers: how many answers of the micro model differ from those of separate prompts by `generate`, for the
  evaluation's questions and for images of the training split that have several prompts. Both must be prepared
  and extracted: run `dvc repro extract` before.

Shapes: see atr.core.tokens.
"""

import time
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from string import ascii_lowercase
from typing import Any

import torch
from torch import Tensor

from atr.config import VLMS, Evaluate
from atr.core.timing import device_name
from atr.datasets import PreparedImages, load_prompts, load_questions
from atr.features.store import FeatureStore
from atr.micro.model import PATCH, build_model, build_processor
from atr.reduction import Full
from atr.reduction.registry import build_reducer
from atr.vlm.generation import Generator
from atr.vlm.inputs import FeatureInputs
from atr.vlm.policy import Policy

WIDTH, LAYERS = 512, 10
WORDS = ["".join(letters) for letters in product(ascii_lowercase, repeat=2)]
SPLITS = "evaluate", "pretrain"
BATCH = 64


class RandomFeatures:
    """Features of one image of `side` x `side` tokens, as a stand-in for a feature store."""

    def __init__(self, side: int) -> None:
        self.manifest: dict[str, Any] = {}
        self.grid = side, side
        self.features_ND = torch.randn(side * side, WIDTH, generator=torch.Generator().manual_seed(0))

    def index(self, image: str) -> int:
        """Any image is the first."""
        return 0

    def __getitem__(self, position: int) -> Tensor:
        return self.features_ND


def no_images() -> Any:
    """Stands in for the images, which nobody opens for a reducer without pixels."""
    raise AssertionError("no reducer here reads images")


def random_generator(side: int) -> Generator:
    """A Llava with a small tower and a language model of about 30 million parameters, random weights."""
    processor = build_processor(WORDS, side * PATCH)
    torch.manual_seed(0)
    model = build_model(processor, side * PATCH, WIDTH, layers=1, text_layers=LAYERS).eval()
    source = FeatureInputs(model, processor, RandomFeatures(side), no_images)
    return Generator(model, processor, source, Evaluate())


def answer_alone(generator: Generator, image: str, question: str, reducer: Any, keep: float) -> str:
    """The answer to a prompt of its own, by transformers' `generate`."""
    whole = generator.prepare([[image]], [question]).whole
    assert whole is not None
    reduced = whole.reduce(reducer, Policy(keep, generator.settings.positions))
    tokens = generator.settings.max_new_tokens
    (ids_L,) = generator.model.generate(**reduced, do_sample=False, max_new_tokens=tokens)
    answer: str = generator.processor.decode(ids_L[reduced["input_ids"].shape[1] :], skip_special_tokens=True)
    return answer.strip()


def time_questions(generator: Generator, questions: int, words: int, rounds: int) -> tuple[float, float]:
    """Questions per second with the image read once, and with prompts of their own; alternating."""
    texts = [" ".join(WORDS[first : first + words]) for first in range(questions)]
    shared, alone = [], []
    answer_alone(generator, "image", texts[0], Full(), 1.0)  # warm-up
    for _ in range(rounds):
        start = time.perf_counter()
        generator.answer(generator.prepare([["image"]] * questions, texts), Full(), 1.0)
        between = time.perf_counter()
        answer_alone(generator, "image", texts[0], Full(), 1.0)
        shared.append((between - start) / questions)
        alone.append(time.perf_counter() - between)
    return 1 / median(shared), 1 / median(alone)


Asked = tuple[str, str]
"""The name of an image and a question about it."""


def asked_of(split: str, count: int) -> list[Asked]:
    """The first questions of a split; of the training split, of images that have several prompts."""
    folder = Path("data/prepared") / split
    if split == "evaluate":
        asked = [(question.images[0], question.question) for question in load_questions(folder)]
    else:
        prompts = load_prompts(folder).items()
        asked = [(image, text) for image, texts in prompts if len(texts) > 1 for text in texts]
    return asked[:count]


def load_micro(split: str, precision: str, device: torch.device) -> Generator:
    """The micro model on the stored features of a split."""
    images = partial(PreparedImages, Path("data/prepared") / split)
    features = partial(FeatureStore.open, Path("data/features") / split, {"encoder": "micro"})
    return Generator.load(VLMS["micro"], precision, device, images, features, Evaluate())


def count_changed(
    split: str, count: int, precision: str, keep: float, device: torch.device
) -> tuple[int, int]:
    """How many questions there are, and how many answers differ from those of separate prompts."""
    generator, asked, changed = load_micro(split, precision, device), asked_of(split, count), 0
    reducer = build_reducer("random", 0)
    for first in range(0, len(asked), BATCH):
        images, questions = zip(*asked[first : first + BATCH], strict=True)
        replies = generator.answer(generator.prepare([[name] for name in images], questions), reducer, keep)
        for (name, question), reply in zip(asked[first : first + BATCH], replies, strict=True):
            changed += reply[0] != answer_alone(generator, name, question, reducer, keep)
    return len(asked), changed


def print_speeds(options: Namespace) -> None:
    """Print one line per number of tokens and of questions."""
    for side in options.sides:
        generator = random_generator(side)
        for questions in options.questions:
            once, alone = time_questions(generator, questions, options.words, options.rounds)
            name = f"{side * side} tokens, {questions} questions an image"
            print(
                f"{name:<40}{once:>10.2f} /{alone:>8.2f} questions per second = {once / alone:.2f}",
                flush=True,
            )


def print_changes(options: Namespace) -> None:
    """Print one line per split and precision."""
    for split, precision in product(SPLITS, ("32-true", "bf16-true")):
        count, changed = count_changed(split, options.answers, precision, options.keep, options.device)
        print(f"{split}, {precision}: {changed} of {count} answers differ", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the ratios and the counts."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--sides", nargs="*", type=int, default=[24, 54], help="rows of visual tokens")
    parser.add_argument("--questions", nargs="+", type=int, default=[1, 5, 30], help="about an image")
    parser.add_argument("--words", type=int, default=12, help="words of a question")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each measurement")
    parser.add_argument("--answers", type=int, default=1800, help="questions of each split; 0: only speed")
    parser.add_argument("--keep", type=float, default=0.4, help="kept fraction of their visual tokens")
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    print(device_name(options.device))
    print_speeds(options)
    if options.answers:
        print_changes(options)


if __name__ == "__main__":
    main()
