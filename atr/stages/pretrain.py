"""Stage pretrain: the stored features into a selector, by training it together with a reconstructor."""

import hashlib
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from atr import config
from atr.files import sha256, whole_folder, write_json
from atr.stages import PRETRAIN, PRETRAIN_FEATURES, PRETRAIN_IMAGES, SELECTOR, entry

if TYPE_CHECKING:
    from atr.reduction.training import SelectorTraining

AUTOENCODER = PRETRAIN / "autoencoder"
CHECKPOINTS = PRETRAIN / "checkpoints"
STATISTICS = 1024
"""Training images that the features' mean and deviation are measured on."""


def main(params: config.Params) -> None:
    """Train, or go on with a training of the same parameters and features; write selector and metrics."""
    from atr import tracking

    with tracking.run("pretrain", params) as run, TemporaryDirectory() as folder:
        from lightning.pytorch import seed_everything
        from lightning.pytorch.utilities import rank_zero_only

        from atr.datasets import PreparedImages
        from atr.features.datamodule import FeatureDataModule
        from atr.features.store import FeatureStore
        from atr.hardware import lightning_kwargs
        from atr.reduction.training import MaskPictures, SelectorTraining, new_autoencoder, train

        expect, pretrain = {"encoder": params.encoder.name}, params.pretrain
        store = FeatureStore.open(PRETRAIN_FEATURES, expect, verify=rank_zero_only.rank == 0)
        images = PreparedImages(PRETRAIN_IMAGES)
        data = FeatureDataModule(store, pretrain.batch_size, pretrain.validation, params.seed)
        seed_everything(params.seed, verbose=False)
        manifest, sample = store.manifest, (store[place] for place in data.training[:STATISTICS])
        autoencoder = new_autoencoder(
            pretrain, store.width, store.grid, manifest["encoder"], manifest["layer"], sample
        )
        module = SelectorTraining(autoencoder, pretrain, params.seed)
        pictured = [(store[place], images[place][1]) for place in data.validation[: pretrain.mask_images]]
        pictures = MaskPictures(pictured, Path(folder), lambda path: run.artifact(path, folder="masks"))
        checkpoint = CHECKPOINTS / _checkpoint(params)
        if train(module, data, checkpoint, pictures, run.logger(), **lightning_kwargs(params.trainer)):
            _write(params, module)
            run.metrics(module.history[-1])
            run.artifact(SELECTOR, folder="selector")


def _checkpoint(params: config.Params) -> str:
    """Its name says what the training was: for another parameter or another store none is found."""
    trained_on = {"params": params.raw(), "store": sha256(PRETRAIN_FEATURES / "manifest.json")}
    return hashlib.sha256(json.dumps(trained_on, sort_keys=True).encode()).hexdigest()[:16] + ".ckpt"


def _write(params: config.Params, module: "SelectorTraining") -> None:
    from atr import tracking

    for path, trained in ((SELECTOR, module.autoencoder.selector), (AUTOENCODER, module.autoencoder)):
        with whole_folder(path) as temporary:
            trained.save_pretrained(temporary)
    results = {
        "final": module.history[-1],
        "history": module.history,
        "parameters": params.raw(),
        "provenance": tracking.provenance(),
        "store": sha256(PRETRAIN_FEATURES / "manifest.json"),
    }
    write_json(PRETRAIN / "metrics.json", results)
    # With whole outputs a checkpoint is of no use any more: run again, the stage trains again.
    for checkpoint in CHECKPOINTS.glob("*.ckpt"):
        checkpoint.unlink()


if __name__ == "__main__":
    entry("pretrain", main)
