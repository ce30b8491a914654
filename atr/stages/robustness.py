"""Stage robustness: how much kept tokens and answers change where deployment differs from training.

One process does all of it, on the first device.
"""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING

from atr import config
from atr.core.files import write_json
from atr.stages import ENCODERS, EVALUATE_IMAGES, ROBUSTNESS, entry, weights_of

if TYPE_CHECKING:
    from atr.vlm.generation import Generator


def main(params: config.Params) -> None:
    """Compare every reducer that takes a budget with itself under each variant; write metrics.json."""
    from atr.core import tracking

    with tracking.run("robustness", params) as run:
        from atr.benchmarks import load_benchmark
        from atr.core.hardware import resolved
        from atr.datasets import load_questions
        from atr.datasets.photographs import PHOTOGRAPHS, photograph
        from atr.vlm.inputs import WholeInputs
        from atr.vlm.robustness import Settings, curves, first_of_each, make, robustness

        asked, evaluated = params.robustness, params.evaluate
        questions = first_of_each(load_questions(EVALUATE_IMAGES), asked.questions)
        answerer = _answerer(params)
        # Larger than the tower's images, these show what a resize changes.
        photographs = SimpleNamespace(image=photograph)
        source = WholeInputs(answerer.model, answerer.processor, photographs, evaluated.interpolation)
        reducers, left_out = make(answerer, evaluated.budgeted, weights_of)
        found = robustness(
            answerer,
            reducers,
            questions,
            lambda question, prediction: load_benchmark(question.benchmark).score(prediction, question),
            replace(answerer, source=source),
            list(PHOTOGRAPHS),
            Settings(asked.keep, evaluated.batch_size, evaluated.bootstrap, params.seed),
        )
        provenance = tracking.current_provenance() | {"left_out": left_out}
        computed = {**resolved("32-true", answerer.model.device), **answerer.resolved}
        about = {"parameters": params.raw(), "provenance": provenance, "resolved": computed}
        write_json(ROBUSTNESS / "metrics.json", found | about)
        for fraction, overlaps in curves(found):
            run.metrics(overlaps, round(100 * fraction))
        run.artifact(ROBUSTNESS)


def _answerer(params: config.Params) -> "Generator":
    """The model in the reference deployment, which reads the held-out images themselves."""
    import torch
    from lightning.fabric import Fabric

    from atr.datasets import PreparedImages
    from atr.features.wheel_weights import resolve_weights
    from atr.vlm.checkpoint import load_vlm, version_of
    from atr.vlm.generation import Generator
    from atr.vlm.inputs import WholeInputs

    device = Fabric(accelerator=params.trainer.accelerator, devices=1).device
    tower = partial(resolve_weights, folder=ENCODERS)
    model, processor = load_vlm(params.vlm.path, torch.float32, resolve_weights=tower)
    settings = replace(params.evaluate, positions="original")
    images = PreparedImages(EVALUATE_IMAGES)
    source = WholeInputs(model.to(device), processor, images, settings.interpolation)
    kernel = str(model.config.get_text_config()._attn_implementation)
    resolved = {"attention": kernel, "vlm": version_of(params.vlm.path, model, tower)}
    return Generator(model, processor, source, settings, resolved)


if __name__ == "__main__":
    entry("robustness", main)
