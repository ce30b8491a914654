"""Stage pretrain: train the selector on the stored features, together with a reconstructor."""

from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from atr import config, stages
from atr.core.files import read_json, sha256, whole_folder, write_json

PRETRAIN_CHECKPOINTS = stages.PRETRAIN / "checkpoints"


def main(params: config.Params) -> None:
    """Train, or resume a training with the same parameters and features; write selector and metrics."""
    from atr.core import tracking

    with tracking.run("pretrain", params) as run, TemporaryDirectory() as folder:
        from atr.core.hardware import lightning_kwargs
        from atr.datasets import PreparedImages
        from atr.features.datamodule import FeatureDataModule
        from atr.features.store import FeatureStore
        from atr.reduction import pretraining, selector_card
        from atr.reduction.checkpoints import Checkpoints

        kwargs = lightning_kwargs(params.trainer)
        expected, first = {"encoder": params.encoder.name}, tracking.is_first_process()
        store = FeatureStore.open(stages.PRETRAIN_FEATURES, expected, verify=first)
        images, pretrain = PreparedImages(stages.PRETRAIN_IMAGES, verify=first), params.pretrain
        data = FeatureDataModule(store, pretrain.batch_size, pretrain.validation, params.seed)
        module = _new_training(params, store, data)
        pictured = data.validation[: pretrain.mask_images]
        examples = [(store[place], store.grid_of(place), images[place][1]) for place in pictured]
        publish = partial(run.artifact, folder="masks")
        pictures = pretraining.MaskPictures(examples, Path(folder), publish)
        checkpoints = Checkpoints(PRETRAIN_CHECKPOINTS, **stages.depends_on(params, stages.STORE))
        if pretraining.train_autoencoder(module, data, checkpoints, pictures, run.logger(), **kwargs):
            record = selector_card.record(store.manifest, images.parameters, params.seed, module.history[-1])
            module.autoencoder.selector.note(**record, positions=params.evaluate.positions)
            _write(params, module)
            run.metrics(module.history[-1])
            run.artifact(stages.SELECTOR, folder="selector")


def _new_training(params: config.Params, store: Any, data: Any) -> Any:
    from lightning.pytorch import seed_everything

    from atr.reduction import pretraining

    seed_everything(params.seed, verbose=False)
    sample = (store[place] for place in data.training[: stages.STATISTICS])
    tower = store.manifest["encoder"], store.manifest["layer"]
    autoencoder = pretraining.new_autoencoder(
        params.pretrain, store.width, store.typical_grid, *tower, sample
    )
    return pretraining.AutoencoderTraining(autoencoder, params.pretrain, params.seed)


def _write(params: config.Params, module: Any) -> None:
    from atr.core import tracking
    from atr.core.hardware import resolved

    hardware = resolved(module.trainer.precision, module.trainer.strategy.root_device)
    for path, trained in (
        (stages.SELECTOR, module.autoencoder.selector),
        (stages.AUTOENCODER, module.autoencoder),
    ):
        with whole_folder(path) as temporary:
            trained.save_pretrained(temporary)
    results = {"final": module.history[-1], "history": module.history, "parameters": params.raw()}
    results |= {"provenance": tracking.current_provenance(), "store": sha256(stages.STORE)}
    results["resolved"] = hardware | {"features": read_json(stages.STORE)["resolved"]}
    write_json(stages.PRETRAIN / "metrics.json", results)


if __name__ == "__main__":
    stages.entry("pretrain", main)
