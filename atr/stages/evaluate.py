"""Stage evaluate: one reducer's answers to every held-out question at every kept fraction, and the scores."""

import sys
from argparse import ArgumentParser
from functools import partial
from typing import Any

from atr import config
from atr.files import whole_folder, write_json
from atr.stages import ENCODERS, EVALUATE, EVALUATE_FEATURES, EVALUATE_IMAGES, entry, weights_of


def main(params: config.Params, reducer: str) -> None:
    """Write results.jsonl, summary.json and masks.json of one reducer: all of them are new, or none is."""
    from atr import tracking

    with tracking.run("evaluate", params, part=reducer) as run:
        from lightning.fabric import Fabric

        from atr.benchmarks.loop import save_rows
        from atr.benchmarks.summary import summarise, tokens_full
        from atr.hardware import lightning_kwargs

        fabric = Fabric(**lightning_kwargs(params.trainer))
        fabric.launch()
        rows, masks = _evaluate(params, reducer, fabric)
        if not fabric.is_global_zero:
            return
        names = {"reducer": reducer, "encoder": params.encoder.name, "vlm": params.vlm.name}
        scores, full = summarise(rows, params.evaluate.bootstrap, params.seed), tokens_full(rows)
        about = {"parameters": params.raw(), "provenance": tracking.provenance()}
        with whole_folder(EVALUATE / reducer) as folder:
            save_rows(folder / "results.jsonl", rows)
            write_json(folder / "summary.json", names | {"tokens_full": full, "scores": scores} | about)
            write_json(folder / "masks.json", masks)
        for score in scores:
            kept = score["keep"] or score["tokens"] / score["tokens_full"]
            run.metrics({score.get("group") or score["benchmark"]: score["mean"]}, round(100 * kept))
        run.artifact(EVALUATE / reducer)


def _evaluate(params: config.Params, reducer: str, fabric: Any) -> tuple[list[Any], dict[str, Any]]:
    """The rows of answers, of which each process gives a share, and the tokens that pictures show as kept."""
    from atr.benchmarks.loop import answer_all, pictured, trials_of
    from atr.datasets import PreparedImages, load_questions
    from atr.features.pretrained import locate
    from atr.features.store import FeatureStore
    from atr.hardware import precision_of
    from atr.vlm.answering import Answerer

    asked, questions = params.evaluate, load_questions(EVALUATE_IMAGES)
    precision, first = precision_of(params.trainer), fabric.is_global_zero
    expect, tower = {"encoder": params.encoder.name}, partial(locate, folder=ENCODERS)
    images = partial(PreparedImages, EVALUATE_IMAGES, verify=first)
    features = partial(FeatureStore.open, EVALUATE_FEATURES, expect, verify=first)
    answerer = Answerer.load(params.vlm, precision, fabric.device, images, features, asked, tower)
    keep = answerer.reachable(reducer, asked.keep)
    if below := [f"{fraction:g}" for fraction in asked.keep if fraction not in keep]:
        fabric.print(f"{reducer} cannot keep as few as {', '.join(below)}: left out", file=sys.stderr)
    trials = trials_of(reducer, keep, asked.random_seeds)
    reducers = {
        trial.seed: answerer.reducer(reducer, trial.seed or 0, weights_of(reducer)) for trial in trials
    }
    needs = frozenset().union(*(made.needs for made in reducers.values()))
    rows = answer_all(
        questions,
        answerer.batches(questions, asked.batch_size),
        trials,
        partial(answerer.prepare, needs=needs),
        lambda batch, trial: answerer.answer(batch, reducers[trial.seed], trial.keep),
        (fabric.global_rank, fabric.world_size),
    )
    images_asked, trial = pictured(questions, trials)
    return rows, answerer.masks(images_asked, reducers[trial.seed], trial.keep)


if __name__ == "__main__":
    parser = ArgumentParser(prog="atr.stages.evaluate", description=__doc__)
    parser.add_argument("reducer", choices=(*config.REDUCERS, *config.SELECTORS, *config.DISTILLED))
    entry("evaluate", partial(main, reducer=parser.parse_args().reducer))
