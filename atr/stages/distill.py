"""Stage distill: train a selector to keep the tokens that the frozen language model's answers depend on."""

import random
from functools import partial
from typing import Any

from atr import config, stages
from atr.config.evaluate import Evaluate
from atr.core.files import sha256, whole_folder, write_json

DISTILL_CHECKPOINTS = stages.DISTILL / "checkpoints"


def main(params: config.Params) -> None:
    """Train, or resume a training with the same parameters and inputs; write selector and metrics."""
    from atr.core import tracking

    with tracking.run("distill", params) as run:
        from lightning.pytorch import seed_everything

        from atr.core.hardware import lightning_kwargs
        from atr.datasets import PreparedImages, load_prompts
        from atr.features.store import FeatureStore
        from atr.reduction import selector_card
        from atr.reduction.checkpoints import Checkpoints
        from atr.vlm import distillation
        from atr.vlm.checkpoint import load_skeleton

        distillation.check_teacher(load_skeleton(params.vlm.path))  # before anything is read
        kwargs = lightning_kwargs(params.trainer)
        expected, first = {"encoder": params.encoder.name}, tracking.is_first_process()
        store = FeatureStore.open(stages.PRETRAIN_FEATURES, expected, verify=first)
        images = PreparedImages(stages.PRETRAIN_IMAGES, verify=first)
        recipe, seed, prompts = params.distill, params.seed, load_prompts(stages.PRETRAIN_IMAGES)
        names = random.Random(seed).sample(images.ids, min(recipe.images, len(images)))
        prompted = [(name, prompts[name]) for name in names]
        data = distillation.PromptedImageData(prompted, recipe.batch_size, recipe.validation, seed)
        seed_everything(seed, verbose=False)
        sample = (store[store.index(names[place])] for place in data.training[: stages.STATISTICS])
        tower = store.manifest["encoder"], store.manifest["layer"]
        selector = distillation.new_selector(recipe, store.width, store.typical_grid, *tower, sample)
        module = distillation.Distillation(selector, _load_generator(params, images, store), recipe, seed)
        read = stages.depends_on(params, stages.STORE, stages.PRETRAIN_IMAGES / "manifest.json")
        checkpoints = Checkpoints(DISTILL_CHECKPOINTS, teacher=dict(module.generator.resolved), **read)
        if distillation.train_selector(module, data, checkpoints, run.logger(), **kwargs):
            manifest, final = store.manifest | {"images": len(names)}, module.history[-1]
            record = selector_card.record(manifest, images.parameters, seed, final)
            selector.note(**record, taught_by=params.vlm.name, positions=params.evaluate.positions)
            _write(params, module)
            run.metrics(final)
            run.artifact(stages.DISTILLED, folder="selector")


def _load_generator(params: config.Params, images: Any, store: Any) -> Any:
    """The frozen model, on the same inputs as in stage evaluate."""
    import torch

    from atr.core.hardware import precision_of
    from atr.features.wheel_weights import resolve_weights
    from atr.vlm.generation import Generator

    precision, device = precision_of(params.trainer), torch.device("cpu")  # until the trainer moves it
    tower = partial(resolve_weights, folder=stages.ENCODER_FOLDER)
    settings = Evaluate(positions=params.evaluate.positions, max_new_tokens=params.distill.max_new_tokens)
    return Generator.load(params.vlm, precision, device, lambda: images, lambda: store, settings, tower)


def _write(params: config.Params, module: Any) -> None:
    from atr.core import tracking
    from atr.core.hardware import resolved

    hardware = resolved(module.trainer.precision, module.trainer.strategy.root_device)
    with whole_folder(stages.DISTILLED) as folder:
        module.selector.save_pretrained(folder)
    results = {"final": module.history[-1], "history": module.history, "parameters": params.raw()}
    results |= {"provenance": tracking.current_provenance(), "store": sha256(stages.STORE)}
    results["resolved"] = hardware | dict(module.generator.resolved)
    write_json(stages.DISTILL / "metrics.json", results)


if __name__ == "__main__":
    stages.entry("distill", main)
