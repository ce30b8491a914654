"""Stage distill: a selector that learns from the frozen language model what its answers depend on."""

import random
from functools import partial
from typing import Any

from atr import config
from atr.files import digest, sha256, whole_folder, write_json
from atr.stages import DISTILL, DISTILLED, ENCODERS, PRETRAIN_FEATURES, PRETRAIN_IMAGES, entry
from atr.stages.pretrain import STATISTICS, STORE

CHECKPOINTS = DISTILL / "checkpoints"


def main(params: config.Params) -> None:
    """Train, or go on with a training of the same parameters and features; write selector and metrics."""
    from atr import tracking

    with tracking.run("distill", params) as run:
        from lightning.pytorch import seed_everything

        from atr.datasets import PreparedImages
        from atr.datasets.pretraining import AskedImages
        from atr.features.store import FeatureStore
        from atr.hardware import lightning_kwargs
        from atr.reduction import card
        from atr.vlm import distillation

        expect, first = {"encoder": params.encoder.name}, tracking.is_first_process()
        store = FeatureStore.open(PRETRAIN_FEATURES, expect, verify=first)
        images, recipe, seed = PreparedImages(PRETRAIN_IMAGES, verify=first), params.distill, params.seed
        names = random.Random(seed).sample(images.ids, min(recipe.images, len(images)))
        asked = AskedImages(names, images.parameters)
        data = distillation.AskedData(asked, recipe.batch_size, recipe.validation, seed)
        seed_everything(seed, verbose=False)
        sample = (store[store.index(names[place])] for place in data.training[:STATISTICS])
        about = (store.manifest["encoder"], store.manifest["layer"])
        selector = distillation.new_selector(recipe, store.width, store.grid, *about, sample)
        module = distillation.Distillation(selector, _answerer(params, images, store), recipe, seed)
        checkpoint = CHECKPOINTS / f"{digest(params=params.raw(), store=sha256(STORE))}.ckpt"
        kwargs = lightning_kwargs(params.trainer)
        if distillation.train(module, data, checkpoint, run.logger(), **kwargs):
            noted = card.record(store.manifest, images.parameters, seed, module.history[-1])
            selector.note(**noted, taught_by=params.vlm.name, positions=params.evaluate.positions)
            _write(params, module)
            run.metrics(module.history[-1])
            run.artifact(DISTILLED, folder="selector")
            checkpoint.unlink(missing_ok=True)


def _answerer(params: config.Params, images: Any, store: Any) -> Any:
    """The frozen model, given the features as the stage evaluate gives them."""
    import torch

    from atr.features.pretrained import locate
    from atr.hardware import precision_of
    from atr.vlm.answering import Answerer

    positions, words = params.evaluate.positions, params.distill.max_new_tokens
    settings = config.Evaluate(positions=positions, max_new_tokens=words)
    precision, device = precision_of(params.trainer), torch.device("cpu")  # until the trainer has one
    opened, tower = (lambda: images, lambda: store), partial(locate, folder=ENCODERS)
    return Answerer.load(params.vlm, precision, device, *opened, settings, tower)


def _write(params: config.Params, module: Any) -> None:
    from atr import tracking

    with whole_folder(DISTILLED) as folder:
        module.selector.save_pretrained(folder)
    results = {"final": module.history[-1], "history": module.history, "parameters": params.raw()}
    write_json(
        DISTILL / "metrics.json", results | {"provenance": tracking.provenance(), "store": sha256(STORE)}
    )


if __name__ == "__main__":
    entry("distill", main)
