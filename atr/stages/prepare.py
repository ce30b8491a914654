"""Stage prepare: write the images to pretrain on and the questions to evaluate with."""

import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from atr import config
from atr.stages import EVALUATE_IMAGES, PRETRAIN_IMAGES, entry

if TYPE_CHECKING:
    from atr.benchmarks import Benchmark
    from atr.config.prepare import Prepare
    from atr.core.records import Question
    from atr.datasets.evaluation import Pictured


PRETRAINING = frozenset({"source", "images", "prompts", "repository"})
"""Parameters of `prepare` that the pretraining images depend on."""


def main(params: config.Params) -> None:
    """Write data/prepared: images to pretrain on, and images and questions to evaluate with."""
    from tqdm import tqdm

    from atr.benchmarks import HubDataset, load_benchmark
    from atr.core import tracking
    from atr.core.files import whole_folder
    from atr.datasets import evaluation
    from atr.datasets.annotations import PROMPT_ANNOTATION, TEXT_ANNOTATION
    from atr.datasets.prepared import save_images
    from atr.datasets.questions import save_questions
    from atr.datasets.training_images import COCO, training_images

    with tracking.run("prepare", params) as run:
        count = params.prepare.images
        benchmarks = [load_benchmark(name) for name in params.prepare.names]
        streams = [_check_scores(benchmark, _questions(benchmark, params)) for benchmark in benchmarks]
        images = training_images(params.prepare, params.seed)
        pretraining, evaluated = _parameters(params)
        coco = [HubDataset(*COCO)] if params.prepare.source == "coco" else []
        pretraining["commits"] = _commits(params.prepare, coco)
        evaluated["commits"] = _commits(params.prepare, (benchmark.source for benchmark in benchmarks))
        with whole_folder(PRETRAIN_IMAGES) as folder:
            progress = tqdm(images, "pretraining images", count, mininterval=1)
            save_images(folder, progress, pretraining, PROMPT_ANNOTATION)
        questions: list[Question] = []
        pictured = (question for stream in streams for question in stream)
        with whole_folder(EVALUATE_IMAGES) as folder:
            progress = tqdm(pictured, "questions", mininterval=1)
            save_images(folder, evaluation.deduplicate(progress, questions), evaluated, TEXT_ANNOTATION)
            unreadable = evaluation.unreadable_questions(questions)
            save_questions(folder, questions)
        for question in unreadable:
            print(f"atr prepare: {question.id} will not be asked: {question.unreadable}", file=sys.stderr)
        run.metrics({"images/pretrain": count, "questions": len(questions), "unreadable": len(unreadable)})
        run.artifact(EVALUATE_IMAGES / "questions.jsonl")


def _questions(benchmark: "Benchmark", params: config.Params) -> "Iterator[Pictured]":
    """Questions of a benchmark with their images; a missing dataset raises before any image is written."""
    from atr.benchmarks import DrawingModule
    from atr.datasets import drawn, evaluation, parquet

    prepare, source, names = params.prepare, benchmark.source, (benchmark.name, benchmark.group)
    if isinstance(source, DrawingModule):
        rows = drawn.draw_rows(source.module, benchmark.name, prepare.split, params.seed)
        return evaluation.first_questions(*names, benchmark.examples(rows), prepare.questions)
    table = parquet.read_rows(parquet.find_files(prepare.repository, source.hub, source.files))
    if source.images:
        images = parquet.find_files(prepare.repository, source.hub, source.images)
        table = parquet.join_images(table, images, source.image_key)
    return evaluation.sample_questions(*names, benchmark.examples(table), prepare.questions, params.seed)


def _check_scores(benchmark: "Benchmark", pictured: "Iterable[Pictured]") -> "Iterator[Pictured]":
    """Score each question's first answer, so that a broken score() fails before any model answers."""
    for question, images in pictured:
        benchmark.score(question.answers[0], question)
        yield question, images


def _parameters(params: config.Params) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parameters of the pretraining images and of the questions.

    They are kept apart so that adding a benchmark does not retrain the selector.
    """
    prepare = params.raw()["prepare"]
    drawn = {"benchmarks"} if prepare["source"] == "micro" else set()
    pretraining, questions = (
        {"seed": params.seed, "prepare": {key: value for key, value in prepare.items() if key in keys}}
        for keys in (PRETRAINING | drawn, prepare.keys() - PRETRAINING | {"repository"})
    )
    return pretraining, questions


def _commits(prepare: "Prepare", sources: "Iterable[object]") -> dict[str, str]:
    """The commits of those sources that are datasets of the hub."""
    from atr.benchmarks import HubDataset
    from atr.datasets import parquet

    datasets = [source.hub for source in sources if isinstance(source, HubDataset)]
    return parquet.resolve_commits(prepare.repository, dict.fromkeys(datasets))


if __name__ == "__main__":
    entry("prepare", main)
