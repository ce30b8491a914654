"""Stage reconstructor: train the reconstructor on random masks that all cells of stage intrinsic share."""

from typing import TYPE_CHECKING, Any

from atr import config
from atr.core.files import whole_folder, write_json
from atr.stages import PRETRAIN_FEATURES, RANDOM_MASKS, RECONSTRUCTOR, STATISTICS, entry

if TYPE_CHECKING:
    from atr.core.tracking import Run
    from atr.features.store import FeatureStore


def main(params: config.Params) -> None:
    """Train the reconstructor, and selectors with further seeds to measure the selector's stability."""
    from atr.core import tracking

    with tracking.run("reconstructor", params) as run:
        from atr.core.hardware import resolved
        from atr.features.store import FeatureStore

        first, expect = tracking.is_first_process(), {"encoder": params.encoder.name}
        store = FeatureStore.open(PRETRAIN_FEATURES, expect, verify=first)
        reconstructor, *selectors = [
            _train(params, store, number, run) for number in range(params.intrinsic.training_seeds)
        ]
        if not reconstructor.trainer.is_global_zero:
            return
        with whole_folder(RANDOM_MASKS.parent) as folder:
            reconstructor.autoencoder.save_pretrained(folder / RANDOM_MASKS.name)
            for number, training in enumerate(selectors, start=1):
                training.autoencoder.selector.save_pretrained(folder / f"selector-{number}")
        device = reconstructor.trainer.strategy.root_device
        computed = resolved(reconstructor.trainer.precision, device) | {
            "features": store.manifest["resolved"]
        }
        results = {
            "parameters": params.raw(),
            "provenance": tracking.current_provenance(),
            "resolved": computed,
        }
        write_json(RECONSTRUCTOR / "metrics.json", results)


def _train(params: config.Params, store: "FeatureStore", number: int, run: "Run") -> Any:
    """The finished training of the reconstructor (number 0), or of a selector with another seed (from 1)."""
    from lightning.pytorch import seed_everything

    from atr.core.hardware import lightning_kwargs
    from atr.features.datamodule import FeatureDataModule
    from atr.reduction import pretraining

    kwargs, seed = lightning_kwargs(params.trainer), (params.seed + number) % 2**32
    pretrain, source = params.pretrain, (store.manifest["encoder"], store.manifest["layer"])
    seed_everything(seed, verbose=False)
    data = FeatureDataModule(store, pretrain.batch_size, pretrain.validation, seed)
    sample = (store[place] for place in data.training[:STATISTICS])
    net = pretraining.new_autoencoder(pretrain, store.width, store.typical_grid, *source, sample)
    if number:
        selector = pretraining.AutoencoderTraining(net, pretrain, seed)
        return pretraining.train_beside(selector, data, pretrain.epochs, None, **kwargs)
    data.training = data.training[: params.intrinsic.pretrain_images]
    reconstructor = pretraining.ReconstructorTraining(net, pretrain, seed)
    return pretraining.train_beside(reconstructor, data, params.intrinsic.epochs, run.logger(), **kwargs)


if __name__ == "__main__":
    entry("reconstructor", main)
