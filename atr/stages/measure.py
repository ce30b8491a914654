"""Stage measure: what the reducers keep of held-out images, judged without a language model."""

from collections.abc import Iterator
from functools import cache, partial
from typing import Any

from atr import config, stages
from atr.files import write_json
from atr.stages.pretrain import AUTOENCODER, STATISTICS


def main(params: config.Params) -> None:
    """Train the reconstructor of random masks and selectors of further seeds, then write metrics.json."""
    from atr import tracking

    with tracking.run("measure", params) as run:
        from atr.features.observed import GIVEN
        from atr.features.store import FeatureStore
        from atr.hardware import resolved
        from atr.reduction import autoencoder, measures

        asked, named, expect = params.measure, params.evaluate, {"encoder": params.encoder.name}
        trained = autoencoder.FeatureAutoencoder.from_pretrained(AUTOENCODER)
        first = tracking.is_first_process()
        held_out = FeatureStore.open(stages.EVALUATE_FEATURES, expect, verify=first)
        store = FeatureStore.open(stages.PRETRAIN_FEATURES, expect, verify=first)
        random, *others = [_train(params, store, number, run) for number in range(asked.training_seeds)]
        if not random.trainer.is_global_zero:
            return
        with (device := random.trainer.strategy.root_device):
            reducers, left_out = measures.made(named.budgeted, named.random_seeds, stages.weights_of, GIVEN)
        images = list(_images(params, held_out, measures.needs(reducers), device))
        nets = {"reconstruction": trained.to(device), "reconstruction_random": random.autoencoder.to(device)}
        selectors = [trained.selector, *(other.autoencoder.selector for other in others)]
        results = measures.measure(reducers, nets, selectors, images, named.keep, asked.overlap_keep)
        about = {"parameters": params.raw(), "provenance": tracking.provenance() | {"left_out": left_out}}
        features = {"features": held_out.manifest["resolved"]}
        about["resolved"] = resolved(random.trainer.precision, device) | features
        write_json(stages.MEASURE / "metrics.json", results | about)
        for fraction, values in measures.curves(results):
            run.metrics(values, round(100 * fraction))
        run.artifact(stages.MEASURE)


def _train(params: config.Params, store: Any, number: int, run: Any) -> Any:
    """Module 0, of the reconstructor of random masks, or that of a further selector, after its training."""
    from lightning.pytorch import seed_everything

    from atr.features.datamodule import FeatureDataModule
    from atr.hardware import lightning_kwargs
    from atr.reduction import training

    pretrain, about = params.pretrain, (store.manifest["encoder"], store.manifest["layer"])
    kwargs, seed = lightning_kwargs(params.trainer), (params.seed + number) % 2**32
    seed_everything(seed, verbose=False)
    data = FeatureDataModule(store, pretrain.batch_size, pretrain.validation, seed)
    sample = (store[place] for place in data.training[:STATISTICS])
    net = training.new_autoencoder(pretrain, store.width, store.grid, *about, sample)
    if number:
        selector = training.SelectorTraining(net, pretrain, seed)
        return training.train_beside(selector, data, pretrain.epochs, None, **kwargs)
    data.training = data.training[: params.measure.pretrain_images]
    random = training.ReconstructorTraining(net, pretrain, seed)
    return training.train_beside(random, data, params.measure.epochs, run.logger(), **kwargs)


def _images(params: config.Params, store: Any, needs: frozenset[str], device: Any) -> Iterator[Any]:
    """Batches of the held-out images that are measured, at even steps through all of them."""
    from atr.datasets import PreparedImages
    from atr.datasets.held_out import text_centres
    from atr.features.observed import encoder_of, evenly, observed
    from atr.reduction.measures import Images

    asked, prepared = params.measure, PreparedImages(stages.EVALUATE_IMAGES)
    drawn = prepared.parameters
    encoder = cache(partial(encoder_of, store, params.encoder, stages.ENCODERS, device))
    for names in evenly(store, asked.images, asked.batch_size):
        centres = [text_centres(name, drawn["seed"], drawn["prepare"]["split"]) for name in names]
        yield Images.of(observed(store, names, prepared.image, encoder, needs, device), centres)


if __name__ == "__main__":
    stages.entry("measure", main)
