"""Stage evaluate: answer and score every evaluation question with one reducer at every kept fraction."""

import sys
from functools import partial
from typing import Any

from atr import config, stages
from atr.core import catalog
from atr.core.files import sha256, whole_folder, write_json


def main(params: config.Params, reducer: str) -> None:
    """Write results.jsonl, summary.json and masks.json together; an interrupted run is resumed."""
    from atr.core import tracking

    with tracking.run("evaluate", params, part=reducer) as run:
        from lightning.fabric import Fabric

        from atr.benchmarks.runner import answer_all, choose_pictured
        from atr.benchmarks.summary import mean_tokens_full, score_curves, summarise
        from atr.core.answer_files import UnfinishedRows, save_rows
        from atr.core.hardware import lightning_kwargs, precision_of, resolved
        from atr.datasets import load_questions
        from atr.vlm.generation import ReducedGenerator

        fabric = Fabric(**lightning_kwargs(params.trainer))
        fabric.launch()
        questions, evaluate = load_questions(stages.EVALUATE_IMAGES), params.evaluate
        generator = _load_generator(params, fabric)
        machine = resolved(precision_of(params.trainer), fabric.device) | dict(generator.resolved)
        computed = {"provenance": tracking.current_provenance(), "resolved": machine}
        trials = _trials(params, reducer, generator, fabric)
        seeds, weights = {trial.seed for trial in trials}, stages.weights_of(reducer)
        reduced = ReducedGenerator.build(generator, reducer, seeds, weights)
        batches = generator.batches(questions, evaluate.batch_tokens)
        # The package's code and the parameters do not include a reducer file of the user's own.
        path = stages.unfinished(params, reducer, file=sha256(catalog.reducer_file(reducer)), **computed)
        share, resumed = (fabric.global_rank, fabric.world_size), UnfinishedRows(path, fabric.global_rank)
        rows = answer_all(questions, batches, trials, reduced.prepare, reduced.answer, share, resumed)
        if not fabric.is_global_zero:
            return
        scores, full = summarise(rows, evaluate.bootstrap, params.seed), mean_tokens_full(rows)
        names = {"reducer": reducer, "encoder": params.encoder.name, "vlm": params.vlm.name}
        summary = {**names, **computed, "parameters": params.raw(), "tokens_full": full, "scores": scores}
        with whole_folder(stages.EVALUATE / reducer) as folder:
            save_rows(folder / "results.jsonl", rows)
            write_json(folder / "masks.json", reduced.masks(*choose_pictured(questions, trials, rows)))
            files = {file.name: sha256(file) for file in folder.iterdir()}
            write_json(folder / "summary.json", summary | {"files": files})
        resumed.remove_others()
        for keep, name_scores, mean in score_curves(scores):
            run.metrics({name_scores: mean}, round(100 * keep))
        # Not the answers themselves: `files` has their checksums, and DVC keeps them.
        run.artifact(stages.EVALUATE / reducer / "summary.json")


def _load_generator(params: config.Params, fabric: Any) -> Any:
    from atr.core.hardware import precision_of
    from atr.datasets import PreparedImages
    from atr.features.store import FeatureStore
    from atr.features.wheel_weights import resolve_weights
    from atr.vlm.generation import Generator

    expected, verify = {"encoder": params.encoder.name}, fabric.is_global_zero
    images = partial(PreparedImages, stages.EVALUATE_IMAGES, verify=verify)
    features = partial(FeatureStore.open, stages.EVALUATE_FEATURES, expected, verify=verify)
    precision, tower = precision_of(params.trainer), partial(resolve_weights, folder=stages.ENCODER_FOLDER)
    return Generator.load(params.vlm, precision, fabric.device, images, features, params.evaluate, tower)


def _trials(params: config.Params, reducer: str, generator: Any, fabric: Any) -> list[Any]:
    """Trials of the reducer at the kept fractions that it can reach; prints the others to stderr."""
    from atr.benchmarks.runner import trials_of

    keep = generator.reachable(reducer, params.evaluate.keep)
    if unreachable := [f"{fraction:g}" for fraction in params.evaluate.keep if fraction not in keep]:
        fabric.print(f"{reducer} cannot keep as few as {', '.join(unreachable)}: left out", file=sys.stderr)
    return trials_of(reducer, keep, params.evaluate.random_seeds)


if __name__ == "__main__":
    stages.entry_of_reducer("evaluate", main)
