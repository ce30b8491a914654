"""Stage evaluate: one reducer's answers to every held-out question at every kept fraction, and the scores."""

import sys
from functools import partial
from typing import TYPE_CHECKING

from atr import config
from atr.core.files import whole_folder, write_json
from atr.stages import (
    ENCODERS,
    EVALUATE,
    EVALUATE_FEATURES,
    EVALUATE_IMAGES,
    entry_of_reducer,
    unfinished,
    weights_of,
)

if TYPE_CHECKING:
    from lightning.fabric import Fabric

    from atr.vlm.generation import Generator


def main(params: config.Params, reducer: str) -> None:
    """Write results.jsonl, summary.json and masks.json of one reducer, all or none; stopped, it goes on."""
    from atr.core import tracking

    with tracking.run("evaluate", params, part=reducer) as run:
        from lightning.fabric import Fabric

        from atr.benchmarks.answer_files import UnfinishedRows, save_rows
        from atr.benchmarks.runner import answer_all, choose_pictured, trials_of
        from atr.benchmarks.summary import mean_tokens_full, score_curves, summarise
        from atr.core.hardware import lightning_kwargs, precision_of, resolved
        from atr.datasets import load_questions
        from atr.vlm.generation import Reduced

        fabric = Fabric(**lightning_kwargs(params.trainer))
        fabric.launch()
        asked, questions, provenance = params.evaluate, load_questions(EVALUATE_IMAGES), tracking.provenance()
        answerer = _answerer(params, fabric)
        computed = {**resolved(precision_of(params.trainer), fabric.device), **answerer.resolved}
        keep = answerer.reachable(reducer, asked.keep)
        if below := [f"{fraction:g}" for fraction in asked.keep if fraction not in keep]:
            fabric.print(f"{reducer} cannot keep as few as {', '.join(below)}: left out", file=sys.stderr)
        trials = trials_of(reducer, keep, asked.random_seeds)
        reduced = Reduced.by(answerer, reducer, {trial.seed for trial in trials}, weights_of(reducer))
        batches = answerer.batches(questions, asked.batch_size)
        name = unfinished(params, reducer, provenance=provenance, resolved=computed)
        share, stopped = (fabric.global_rank, fabric.world_size), UnfinishedRows(name, fabric.global_rank)
        rows = answer_all(questions, batches, trials, reduced.prepare, reduced.answer, share, stopped)
        if not fabric.is_global_zero:
            return
        names = {"reducer": reducer, "encoder": params.encoder.name, "vlm": params.vlm.name}
        about = names | {"parameters": params.raw(), "provenance": provenance, "resolved": computed}
        scores, full = summarise(rows, asked.bootstrap, params.seed), mean_tokens_full(rows)
        with whole_folder(EVALUATE / reducer) as folder:
            save_rows(folder / "results.jsonl", rows)
            write_json(folder / "summary.json", about | {"tokens_full": full, "scores": scores})
            write_json(folder / "masks.json", reduced.masks(*choose_pictured(questions, trials, rows)))
        stopped.remove_others()
        for kept, scored, mean in score_curves(scores):
            run.metrics({scored: mean}, round(100 * kept))
        run.artifact(EVALUATE / reducer)


def _answerer(params: config.Params, fabric: "Fabric") -> "Generator":
    from atr.core.hardware import precision_of
    from atr.datasets import PreparedImages
    from atr.features.store import FeatureStore
    from atr.features.wheel_weights import locate
    from atr.vlm.generation import Generator

    expect, verify = {"encoder": params.encoder.name}, fabric.is_global_zero
    images = partial(PreparedImages, EVALUATE_IMAGES, verify=verify)
    features = partial(FeatureStore.open, EVALUATE_FEATURES, expect, verify=verify)
    precision, tower = precision_of(params.trainer), partial(locate, folder=ENCODERS)
    return Generator.load(params.vlm, precision, fabric.device, images, features, params.evaluate, tower)


if __name__ == "__main__":
    entry_of_reducer("evaluate", main)
