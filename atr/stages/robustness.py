"""Stage robustness: how a reducer's tokens and answers change in deployments unlike its training."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

from atr import config, stages
from atr.core import catalog

NOT_COMPARED = {
    "keep": [], "questions": 0, "photographs": 0, "full": None, "reference": {}, "variants": [],
    "resolved": {},
}  # fmt: skip


def main(params: config.Params, reducer: str) -> None:
    """Compare one reducer with itself under each variant, in one process; write its metrics.json."""
    from atr.core import tracking

    source = params, tracking.current_provenance()
    write = partial(stages.write_results, stages.ROBUSTNESS, *source, reducer)
    if left_out := _why_left_out(reducer):
        write(**NOT_COMPARED, left_out=left_out)
        return

    with tracking.run("robustness", params, part=reducer) as run:
        from atr.vlm.robustness import robustness_curves

        for fraction, overlaps in robustness_curves(write(**_measure(params, reducer))):
            run.metrics(overlaps, round(100 * fraction))
        run.artifact(stages.ROBUSTNESS / reducer)


def _why_left_out(reducer: str) -> str:
    """Why there is nothing to compare, found without loading a model; empty if there is."""
    traits = catalog.reducer_traits(reducer)
    if traits.draws:
        return "draws its tokens at random"
    if traits.budget in ("nothing", "own"):
        return stages.NO_BUDGET

    from atr.reduction.registry import why_not_selecting

    return why_not_selecting(reducer)


def _measure(params: config.Params, reducer: str) -> dict[str, Any]:
    """The changes of one reducer under each variant; `full` shows the changes without any selection."""
    from atr.benchmarks import load_benchmark
    from atr.core.hardware import resolved
    from atr.datasets import load_questions, photographs
    from atr.vlm.inputs import ImageInputs
    from atr.vlm.robustness import RobustnessSettings, first_of_each, robustness

    settings = params.robustness
    questions = first_of_each(load_questions(stages.EVALUATE_IMAGES), settings.questions)
    generator = _load_generator(params)
    built = generator.reducer(reducer, 0, stages.weights_of(reducer))
    # The photographs are larger than the tower's input, so a changed resize matters.
    pictures = SimpleNamespace(image=photographs.photograph)
    source = ImageInputs(generator.model, generator.processor, pictures, params.evaluate.interpolation)
    is_full = catalog.reducer_traits(reducer).budget == "all"
    measured = robustness(
        generator,
        {} if is_full else {reducer: built},
        questions,
        lambda question, prediction: load_benchmark(question.benchmark).score(prediction, question),
        replace(generator, source=source),
        list(photographs.PHOTOGRAPHS),
        RobustnessSettings(
            settings.keep, params.evaluate.batch_tokens, params.evaluate.bootstrap, params.seed
        ),
        with_full=is_full,
    )
    computed = {**resolved("32-true", generator.model.device), **generator.resolved}
    return {**measured, "left_out": "", "resolved": computed}


def _load_generator(params: config.Params) -> Any:
    """The model in the reference deployment; it reads the held-out images, not their stored features."""
    from atr.config.evaluate import Evaluate
    from atr.core.hardware import first_device
    from atr.datasets import PreparedImages
    from atr.features.wheel_weights import resolve_weights
    from atr.vlm.generation import Generator

    device = first_device(params.trainer.accelerator)
    tower = partial(resolve_weights, folder=stages.ENCODER_FOLDER)
    settings = Evaluate(**vars(params.evaluate), positions="original")
    images: Any = partial(PreparedImages, stages.EVALUATE_IMAGES)
    vlm = replace(params.vlm, stored=False)  # so that images are opened, and no features
    return Generator.load(vlm, "32-true", device, images, images, settings, tower)


if __name__ == "__main__":
    stages.entry_of_reducer("robustness", main)
