"""Stage intrinsic: measure one reducer on held-out images without a language model."""

from functools import cache, partial
from typing import Any

from atr import config, stages
from atr.core import catalog
from atr.core.files import read_json

NOT_MEASURED: dict[str, Any] = {"lines": None, "masks": None, "stability": None, "resolved": {}}


def main(params: config.Params, reducer: str) -> None:
    """Measure one reducer, in one process on the first device; write its metrics.json."""
    from atr.core import tracking

    source = params, tracking.current_provenance()
    write = partial(stages.write_results, stages.INTRINSIC, *source, reducer, keep=params.evaluate.keep)
    if left_out := _why_left_out(reducer):
        write(**NOT_MEASURED, left_out=left_out)
        return

    with tracking.run("intrinsic", params, part=reducer) as run:
        from atr.reduction.intrinsic import intrinsic_curves

        for keep, values in intrinsic_curves(write(**_measure(params, reducer))):
            run.metrics({f"{reducer}/{name}": value for name, value in values.items()}, round(100 * keep))
        run.artifact(stages.INTRINSIC / reducer)


def _why_left_out(reducer: str) -> str:
    """Why there is nothing to measure, found without loading a model; empty if there is."""
    if catalog.reducer_traits(reducer).budget != "asked":
        return stages.NO_BUDGET

    from atr.features.signals import ENCODER_SIGNALS, RAGGED_SIGNALS, signals_of
    from atr.features.store import FeatureStore
    from atr.reduction.intrinsic import why_not_measurable
    from atr.reduction.layer_schedule import LayerReducer
    from atr.reduction.registry import build_reducer, placeholder

    built = build_reducer(reducer, 0, placeholder())
    # Most reducers need no more than any store has, so that none has to be opened to tell.
    if isinstance(built, LayerReducer) or not why_not_measurable(built, RAGGED_SIGNALS):
        return why_not_measurable(built, RAGGED_SIGNALS)
    signals = signals_of(FeatureStore.open(stages.EVALUATE_FEATURES, verify=False))
    without_model = why_not_measurable(built, signals | ENCODER_SIGNALS)
    return without_model or why_not_measurable(built, signals, "an encoder of one grid")


def _measure(params: config.Params, reducer: str) -> dict[str, Any]:
    """Its lines, masks and stability."""
    from atr.core.hardware import first_device, resolved
    from atr.reduction import intrinsic
    from atr.reduction.registry import build_reducer

    _check_layers(reducer)
    device = first_device(params.trainer.accelerator)
    seeds = params.evaluate.random_seeds if catalog.reducer_traits(reducer).draws else 1
    with device:
        by_seed: Any = [build_reducer(reducer, seed, stages.weights_of(reducer)) for seed in range(seeds)]
    computed = resolved("32-true", device)
    batches, images, computed["features"] = _held_out(params, by_seed[0].needs, device)
    nets = {"reconstruction": stages.AUTOENCODER, "reconstruction_random": stages.RANDOM_MASKS}
    others = sorted(stages.RANDOM_MASKS.parent.glob("selector-*")) if reducer == "selector" else []
    selectors = [stages.SELECTOR, *others] if others else []
    keep, overlap_keep = params.evaluate.keep, params.intrinsic.overlap_keep
    measured = intrinsic.measure(by_seed, nets, selectors, batches, keep, overlap_keep, device)
    if measured["masks"]:
        measured["masks"]["images"] = images
    return {**measured, "left_out": "", "resolved": computed}


def _check_layers(reducer: str) -> None:
    """Raise ValueError naming a folder of weights of another layer, perhaps as wide as the features'."""
    store = stages.EVALUATE_FEATURES / "manifest.json"
    layer = read_json(store)["layer"]
    own = {stages.weights_of(reducer)} if catalog.reducer_traits(reducer).weights else set()
    for folder in sorted({stages.AUTOENCODER, stages.RANDOM_MASKS} | own):
        trained = read_json(folder / "config.json").get("layer")
        if trained not in (None, layer):
            raise ValueError(f"{folder}: was trained on layer {trained}, allowed: {layer}, that of {store}")


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
