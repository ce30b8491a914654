"""Stage intrinsic: what the reducers keep of held-out images, judged without a language model."""

from collections.abc import Iterator, Set
from functools import cache, partial
from typing import Any

from atr import config, stages
from atr.core.files import write_json
from atr.stages.pretrain import AUTOENCODER, STATISTICS


def main(params: config.Params) -> None:
    """Train the reconstructor of random masks and selectors of further seeds, then write metrics.json."""
    from atr.core import tracking

    with tracking.run("intrinsic", params) as run:
        from atr.core.hardware import resolved
        from atr.datasets import PreparedImages
        from atr.features.signals import ENCODER_SIGNALS
        from atr.features.store import FeatureStore
        from atr.reduction import autoencoder, intrinsic

        asked, named, expect = params.intrinsic, params.evaluate, {"encoder": params.encoder.name}
        trained = autoencoder.FeatureAutoencoder.from_pretrained(AUTOENCODER)
        stored = partial(FeatureStore.open, expect=expect, verify=tracking.is_first_process())
        held_out, store = stored(stages.EVALUATE_FEATURES), stored(stages.PRETRAIN_FEATURES)
        prepared = PreparedImages(stages.EVALUATE_IMAGES, verify=tracking.is_first_process())
        random, *others = [_train(params, store, number, run) for number in range(asked.training_seeds)]
        if not random.trainer.is_global_zero:
            return
        with (device := random.trainer.strategy.root_device):
            reducers, left_out = intrinsic.made(
                named.budgeted, named.random_seeds, stages.weights_of, ENCODER_SIGNALS
            )
        images = list(_images(params, held_out, prepared, intrinsic.needs(reducers), device))
        nets = {"reconstruction": trained.to(device), "reconstruction_random": random.autoencoder.to(device)}
        selectors = [trained.selector, *(other.autoencoder.selector for other in others)]
        results = intrinsic.measure(reducers, nets, selectors, images, named.keep, asked.overlap_keep)
        about = {
            "parameters": params.raw(),
            "provenance": tracking.current_provenance() | {"left_out": left_out},
        }
        computed = resolved(random.trainer.precision, device) | {"features": held_out.manifest["resolved"]}
        write_json(stages.INTRINSIC / "metrics.json", results | about | {"resolved": computed})
        for fraction, values in intrinsic.curves(results):
            run.metrics(values, round(100 * fraction))
        run.artifact(stages.INTRINSIC)


def _train(params: config.Params, store: Any, number: int, run: Any) -> Any:
    """Module 0, of the reconstructor of random masks, or that of a further selector, after its training."""
    from lightning.pytorch import seed_everything

    from atr.core.hardware import lightning_kwargs
    from atr.features.datamodule import FeatureDataModule
    from atr.reduction import pretraining

    kwargs, seed = lightning_kwargs(params.trainer), (params.seed + number) % 2**32
    pretrain, about = params.pretrain, (store.manifest["encoder"], store.manifest["layer"])
    seed_everything(seed, verbose=False)
    data = FeatureDataModule(store, pretrain.batch_size, pretrain.validation, seed)
    sample = (store[place] for place in data.training[:STATISTICS])
    net = pretraining.new_autoencoder(pretrain, store.width, store.grid, *about, sample)
    kind: Any = pretraining.SelectorTraining if number else pretraining.ReconstructorTraining
    epochs, logger = (pretrain.epochs, None) if number else (params.intrinsic.epochs, run.logger())
    if not number:
        data.training = data.training[: params.intrinsic.pretrain_images]
    return pretraining.train_beside(kind(net, pretrain, seed), data, epochs, logger, **kwargs)


def _images(params: config.Params, store: Any, prepared: Any, needs: Set[str], device: Any) -> Iterator[Any]:
    """Batches of the held-out images that are measured, at even steps through all of them."""
    from atr.datasets import load_text_centres
    from atr.features.signals import load_store_encoder, observe_signals, sample_evenly
    from atr.reduction.intrinsic import Images

    asked, text_centres = params.intrinsic, load_text_centres(prepared.folder)
    encoder = cache(partial(load_store_encoder, store, params.encoder, stages.ENCODERS, device))
    for names in sample_evenly(store, asked.images, asked.batch_size):
        centres = [text_centres[name] for name in names]
        yield Images.of(observe_signals(store, names, prepared.image, encoder, needs, device), centres)


if __name__ == "__main__":
    stages.entry("intrinsic", main)
