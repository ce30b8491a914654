"""Stage intrinsic: measure one reducer on held-out images without a language model."""

from functools import cache, partial
from typing import Any

from atr import config, stages
from atr.core import catalog
from atr.core.files import write_json

NOT_MEASURED = {"lines": None, "masks": None, "stability": None}


def main(params: config.Params, reducer: str) -> None:
    """Measure one reducer, in one process on the first device; write its metrics.json."""
    from atr.core import tracking

    with tracking.run("intrinsic", params, part=reducer) as run:
        if catalog.reducer_traits(reducer).budget == "asked":
            measured = _measure(params, reducer)
        else:
            measured = {**NOT_MEASURED, "left_out": stages.NO_BUDGET, "resolved": {}}
        source = {"parameters": params.raw(), "provenance": tracking.current_provenance()}
        results = {"reducer": reducer, "keep": params.evaluate.keep, **measured, **source}
        write_json(stages.INTRINSIC / reducer / "metrics.json", results)
        if measured["lines"]:
            from atr.reduction.intrinsic import intrinsic_curves

            for keep, values in intrinsic_curves(results):
                run.metrics({f"{reducer}/{name}": value for name, value in values.items()}, round(100 * keep))
        run.artifact(stages.INTRINSIC / reducer)


def _measure(params: config.Params, reducer: str) -> dict[str, Any]:
    """Its lines, masks and stability, or the reason why the reducer is left out."""
    from atr.core.hardware import first_device, resolved
    from atr.features.signals import ENCODER_SIGNALS
    from atr.reduction import intrinsic
    from atr.reduction.registry import build_reducer

    device = first_device(params.trainer.accelerator)
    seeds = params.evaluate.random_seeds if catalog.reducer_traits(reducer).draws else 1
    with device:
        by_seed: Any = [build_reducer(reducer, seed, stages.weights_of(reducer)) for seed in range(seeds)]
    computed = resolved("32-true", device)
    if left_out := intrinsic.why_not_measurable(by_seed[0], ENCODER_SIGNALS):
        return {**NOT_MEASURED, "left_out": left_out, "resolved": computed}
    batches, images, computed["features"] = _held_out(params, by_seed[0].needs, device)
    nets = {"reconstruction": stages.AUTOENCODER, "reconstruction_random": stages.RANDOM_MASKS}
    others = sorted(stages.RANDOM_MASKS.parent.glob("selector-*")) if reducer == "selector" else []
    selectors = [stages.SELECTOR, *others] if others else []
    keep, overlap_keep = params.evaluate.keep, params.intrinsic.overlap_keep
    measured = intrinsic.measure(by_seed, nets, selectors, batches, keep, overlap_keep, device)
    if measured["masks"]:
        measured["masks"]["images"] = images
    return {**measured, "left_out": "", "resolved": computed}


def _held_out(params: config.Params, needs: Any, device: Any) -> tuple[list[Any], list[str], dict[str, Any]]:
    """Batches of evenly spaced held-out images, the image names, and how the features were computed."""
    from atr.datasets import PreparedImages, load_text_centres
    from atr.features.signals import load_store_encoder, observe_signals, sample_evenly
    from atr.features.store import FeatureStore
    from atr.reduction.intrinsic import HeldOutBatch

    store = FeatureStore.open(stages.EVALUATE_FEATURES, {"encoder": params.encoder.name})
    picture, centres = PreparedImages(stages.EVALUATE_IMAGES).image, load_text_centres(stages.EVALUATE_IMAGES)
    encoder = cache(partial(load_store_encoder, store, params.encoder, stages.ENCODER_FOLDER, device))
    batches, images = [], []
    for names in sample_evenly(store, params.intrinsic.images, params.intrinsic.batch_size):
        fields = observe_signals(store, names, picture, encoder, needs, device)
        batches.append(HeldOutBatch.of(fields, [centres[name] for name in names]))
        images += names
    return batches, images, store.manifest["resolved"]


if __name__ == "__main__":
    stages.entry_of_reducer("intrinsic", main)
