"""Stage distill: a selector that learns from the frozen language model what its answers depend on."""

import random
from functools import partial
from typing import Any

from atr import config
from atr.config.evaluate import Evaluate
from atr.core.files import sha256, whole_folder, write_json
from atr.stages import (
    DISTILL,
    DISTILLED,
    ENCODERS,
    PRETRAIN_FEATURES,
    PRETRAIN_IMAGES,
    STATISTICS,
    STORE,
    depends_on,
    entry,
)

CHECKPOINTS = DISTILL / "checkpoints"


def main(params: config.Params) -> None:
    """Train, or go on with a training of the same parameters and features; write selector and metrics."""
    from atr.core import tracking

    with tracking.run("distill", params) as run:
        from lightning.pytorch import seed_everything

        from atr.core.hardware import lightning_kwargs
        from atr.datasets import PreparedImages, load_prompts
        from atr.features.store import FeatureStore
        from atr.reduction import selector_card
        from atr.reduction.checkpoints import Checkpoints
        from atr.vlm import distillation

        kwargs = lightning_kwargs(params.trainer)
        expect, first = {"encoder": params.encoder.name}, tracking.is_first_process()
        store = FeatureStore.open(PRETRAIN_FEATURES, expect, verify=first)
        images, recipe, seed = PreparedImages(PRETRAIN_IMAGES, verify=first), params.distill, params.seed
        names = random.Random(seed).sample(images.ids, min(recipe.images, len(images)))
        prompts = load_prompts(PRETRAIN_IMAGES)
        asked = [(name, prompts[name]) for name in names]
        data = distillation.AskedData(asked, recipe.batch_size, recipe.validation, seed)
        seed_everything(seed, verbose=False)
        sample = (store[store.index(names[place])] for place in data.training[:STATISTICS])
        about = (store.manifest["encoder"], store.manifest["layer"])
        selector = distillation.new_selector(recipe, store.width, store.grid, *about, sample)
        module = distillation.Distillation(selector, _answerer(params, images, store), recipe, seed)
        known = depends_on(params, STORE, PRETRAIN_IMAGES / "manifest.json")
        checkpoints = Checkpoints(CHECKPOINTS, teacher=dict(module.answerer.resolved), **known)
        if distillation.train(module, data, checkpoints, run.logger(), **kwargs):
            manifest = store.manifest | {"images": len(names)}
            noted = selector_card.record(manifest, images.parameters, seed, module.history[-1])
            selector.note(**noted, taught_by=params.vlm.name, positions=params.evaluate.positions)
            _write(params, module)
            run.metrics(module.history[-1])
            run.artifact(DISTILLED, folder="selector")


def _answerer(params: config.Params, images: Any, store: Any) -> Any:
    """The frozen model, given the features as the stage evaluate gives them."""
    import torch

    from atr.core.hardware import precision_of
    from atr.features.wheel_weights import locate
    from atr.vlm.generation import Generator

    precision, words = precision_of(params.trainer), params.distill.max_new_tokens
    device, tower = torch.device("cpu"), partial(locate, folder=ENCODERS)  # until the trainer has a device
    settings = Evaluate(positions=params.evaluate.positions, max_new_tokens=words)
    return Generator.load(params.vlm, precision, device, lambda: images, lambda: store, settings, tower)


def _write(params: config.Params, module: Any) -> None:
    from atr.core import tracking
    from atr.core.hardware import resolved

    computed = resolved(module.trainer.precision, module.trainer.strategy.root_device)
    about = {"provenance": tracking.provenance(), "resolved": computed | dict(module.answerer.resolved)}
    with whole_folder(DISTILLED) as folder:
        module.selector.save_pretrained(folder)
    results = {"final": module.history[-1], "history": module.history, "parameters": params.raw()}
    write_json(DISTILL / "metrics.json", results | about | {"store": sha256(STORE)})


if __name__ == "__main__":
    entry("distill", main)
