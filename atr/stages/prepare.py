"""DVC stage prepare: the images to pretrain on and the questions to evaluate with, on disk."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from atr import config
from atr.stages import EVALUATE_IMAGES, PRETRAIN_IMAGES, entry

if TYPE_CHECKING:
    from PIL import Image

    from atr.datasets.micro import Sample
    from atr.datasets.questions import Question


def main(params: config.Params) -> None:
    """Write data/prepared: pretraining images, evaluation images and questions, each with its manifest."""
    from tqdm import tqdm

    from atr import tracking
    from atr.datasets.prepared import save_images
    from atr.datasets.questions import save_questions
    from atr.files import whole_folder

    with tracking.run("prepare", params) as run:
        parameters = params.raw()
        with whole_folder(PRETRAIN_IMAGES) as folder:
            wanted = tqdm(
                pretraining_images(params), "pretraining images", params.prepare.images, mininterval=1
            )
            save_images(folder, wanted, parameters)
        samples = list(tqdm(held_out(params), "questions", mininterval=1))
        questions = [question for question, _ in samples]
        with whole_folder(EVALUATE_IMAGES) as folder:
            save_questions(folder, questions)
            save_images(folder, ((question.image, sample.image) for question, sample in samples), parameters)
        run.metrics({"images/pretrain": params.prepare.images, "questions": len(questions)})
        run.artifact(EVALUATE_IMAGES / "questions.jsonl")


def pretraining_images(params: config.Params) -> Iterator[tuple[str, "Image.Image"]]:
    """The micro world's images of all its benchmarks in turn, or the pictures of the user's folder."""
    from atr.datasets import folder, micro

    prepare = params.prepare
    if prepare.source != "micro":
        yield from folder.images(Path(prepare.source), prepare.images, params.seed)
        return
    for index in range(prepare.images):
        benchmark = prepare.benchmarks[index % len(prepare.benchmarks)]
        yield f"{benchmark}/{index:06d}", micro.sample(benchmark, "pretrain", index, params.seed).image


def held_out(params: config.Params) -> "Iterator[tuple[Question, Sample]]":
    """One question an image, so that the questions of a benchmark are independent of each other."""
    from atr.datasets import micro
    from atr.datasets.questions import Question

    for benchmark in params.prepare.benchmarks:
        for index in range(params.prepare.questions):
            sample = micro.sample(benchmark, "evaluate", index, params.seed)
            question, answer = sample.turns[0]
            image = f"{benchmark}/{index:06d}"
            yield (
                Question(f"{image}#0", benchmark, config.BENCHMARKS[benchmark], image, question, [answer]),
                sample,
            )


if __name__ == "__main__":
    entry("prepare", main)
