"""DVC stage prepare: the images to pretrain on and the questions to evaluate with, on disk."""

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from atr import config
from atr.config.prepare import MICRO_BENCHMARKS, Prepare
from atr.core import catalog
from atr.stages import EVALUATE_IMAGES, PRETRAIN_IMAGES, entry

if TYPE_CHECKING:
    from atr.datasets.evaluation import Drawn
    from atr.datasets.questions import Question


def main(params: config.Params) -> None:
    """Write data/prepared: pretraining images, evaluation images and questions, each with its manifest."""
    from tqdm import tqdm

    from atr.core import tracking
    from atr.core.files import whole_folder
    from atr.datasets import evaluation, training_images
    from atr.datasets.prepared import save_images
    from atr.datasets.questions import save_questions

    with tracking.run("prepare", params) as run:
        count = params.prepare.images
        streams = [_questions(benchmark, params) for benchmark in params.prepare.benchmarks]
        images = training_images.images(params.prepare, params.seed)
        parameters = params.raw() | {"commits": _commits(params.prepare)}
        with whole_folder(PRETRAIN_IMAGES) as folder:
            save_images(folder, tqdm(images, "pretraining images", count, mininterval=1), parameters)
        questions: list[Question] = []
        drawn = (question for stream in streams for question in stream)
        with whole_folder(EVALUATE_IMAGES) as folder:
            drawn = tqdm(drawn, "questions", mininterval=1)
            save_images(folder, evaluation.distinct(drawn, questions), parameters)
            unreadable = evaluation.unreadable(questions)
            save_questions(folder, questions)
        for question in unreadable:
            print(f"atr prepare: {question.id} will not be asked: {question.unreadable}", file=sys.stderr)
        numbers = {"images/pretrain": count, "questions": len(questions), "unreadable": len(unreadable)}
        run.metrics(numbers)
        run.artifact(EVALUATE_IMAGES / "questions.jsonl")


def _questions(benchmark: str, params: config.Params) -> "Iterator[Drawn]":
    """The questions of a benchmark with their pictures; what a dataset lacks is found before any is drawn."""
    from atr.datasets import evaluation, parquet

    prepare, about = params.prepare, (benchmark, catalog.benchmark_group(benchmark))
    if benchmark in MICRO_BENCHMARKS:
        return evaluation.drawn_by_micro(*about, prepare.questions, params.seed, prepare.split)
    from atr.benchmarks import BENCHMARKS

    source, examples = BENCHMARKS[benchmark].source, BENCHMARKS[benchmark].examples
    assert source and examples, f"{benchmark} is read from a dataset"
    rows = parquet.rows(parquet.find(prepare.repository, source.hub, source.files))
    if source.images:
        images = parquet.find(prepare.repository, source.hub, source.images)
        rows = parquet.joined(rows, images, source.image_key)
    return evaluation.read_from(*about, examples(rows), prepare.questions, params.seed)


def _commits(prepare: Prepare) -> dict[str, str]:
    """The commits of the hub's datasets that were read."""
    from atr.datasets import parquet, training_images

    datasets = [training_images.COCO[0]] if prepare.source == "coco" else []
    if paper := [name for name in prepare.benchmarks if name not in MICRO_BENCHMARKS]:
        from atr.benchmarks import BENCHMARKS

        datasets += [source.hub for name in paper if (source := BENCHMARKS[name].source)]
    return parquet.commits(prepare.repository, dict.fromkeys(datasets))


if __name__ == "__main__":
    entry("prepare", main)
