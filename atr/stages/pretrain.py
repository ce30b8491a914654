"""Stage pretrain: the stored features into a selector, by training it together with a reconstructor."""

from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from atr import config
from atr.core.files import read_json, sha256, whole_folder, write_json
from atr.stages import (
    AUTOENCODER,
    PRETRAIN,
    PRETRAIN_FEATURES,
    PRETRAIN_IMAGES,
    SELECTOR,
    STATISTICS,
    STORE,
    depends_on,
    entry,
)

if TYPE_CHECKING:
    from atr.reduction.pretraining import AutoencoderTraining

CHECKPOINTS = PRETRAIN / "checkpoints"


def main(params: config.Params) -> None:
    """Train, or go on with a training of the same parameters and features; write selector and metrics."""
    from atr.core import tracking

    with tracking.run("pretrain", params) as run, TemporaryDirectory() as folder:
        from lightning.pytorch import seed_everything

        from atr.core.hardware import lightning_kwargs
        from atr.datasets import PreparedImages
        from atr.features.datamodule import FeatureDataModule
        from atr.features.store import FeatureStore
        from atr.reduction import pretraining, selector_card
        from atr.reduction.checkpoints import Checkpoints

        kwargs = lightning_kwargs(params.trainer)
        expect, first = {"encoder": params.encoder.name}, tracking.is_first_process()
        store = FeatureStore.open(PRETRAIN_FEATURES, expect, verify=first)
        images, pretrain = PreparedImages(PRETRAIN_IMAGES, verify=first), params.pretrain
        data = FeatureDataModule(store, pretrain.batch_size, pretrain.validation, params.seed)
        seed_everything(params.seed, verbose=False)
        manifest, sample = store.manifest, (store[place] for place in data.training[:STATISTICS])
        autoencoder = pretraining.new_autoencoder(
            pretrain, store.width, store.grid, manifest["encoder"], manifest["layer"], sample
        )
        module = pretraining.AutoencoderTraining(autoencoder, pretrain, params.seed)
        pictured = [(store[place], images[place][1]) for place in data.validation[: pretrain.mask_images]]
        publish = partial(run.artifact, folder="masks")
        pictures = pretraining.MaskPictures(pictured, Path(folder), publish)
        checkpoints = Checkpoints(CHECKPOINTS, **depends_on(params, STORE))
        if pretraining.train_autoencoder(module, data, checkpoints, pictures, run.logger(), **kwargs):
            about = selector_card.record(manifest, images.parameters, params.seed, module.history[-1])
            autoencoder.selector.note(**about, positions=params.evaluate.positions)
            _write(params, module)
            run.metrics(module.history[-1])
            run.artifact(SELECTOR, folder="selector")


def _write(params: config.Params, module: "AutoencoderTraining") -> None:
    from atr.core import tracking
    from atr.core.hardware import resolved

    computed = resolved(module.trainer.precision, module.trainer.strategy.root_device)
    for path, trained in ((SELECTOR, module.autoencoder.selector), (AUTOENCODER, module.autoencoder)):
        with whole_folder(path) as temporary:
            trained.save_pretrained(temporary)
    results = {
        "final": module.history[-1],
        "history": module.history,
        "parameters": params.raw(),
        "provenance": tracking.provenance(),
        "resolved": computed | {"features": read_json(STORE)["resolved"]},
        "store": sha256(STORE),
    }
    write_json(PRETRAIN / "metrics.json", results)


if __name__ == "__main__":
    entry("pretrain", main)
