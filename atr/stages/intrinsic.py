"""Stage intrinsic: measure one reducer on held-out images without a language model."""

from collections.abc import Iterator, Set
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from atr import config, stages
from atr.core import catalog
from atr.core.files import write_json

if TYPE_CHECKING:
    import torch

    from atr.reduction.intrinsic import HeldOutBatch

NOTHING = {"lines": None, "masks": None, "stability": None}


def main(params: config.Params, reducer: str) -> None:
    """Measure one reducer, in one process on the first device; write its metrics.json."""
    from atr.core import tracking

    with tracking.run("intrinsic", params, part=reducer) as run:
        if catalog.reducer_traits(reducer).budget == "asked":
            measured = _measure(params, reducer)
        else:
            measured = {**NOTHING, "left_out": stages.NO_BUDGET, "resolved": {}}
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
    from lightning.fabric import Fabric

    from atr.core.hardware import resolved
    from atr.features.signals import ENCODER_SIGNALS
    from atr.reduction import intrinsic
    from atr.reduction.autoencoder import FeatureAutoencoder
    from atr.reduction.registry import build_reducer

    device = Fabric(accelerator=params.trainer.accelerator, devices=1).device
    seeds = params.evaluate.random_seeds if catalog.reducer_traits(reducer).draws else 1
    with device:
        by_seed: Any = [build_reducer(reducer, seed, stages.weights_of(reducer)) for seed in range(seeds)]
    computed = resolved("32-true", device)
    if left_out := intrinsic.why_not_measurable(by_seed[0], ENCODER_SIGNALS):
        return {**NOTHING, "left_out": left_out, "resolved": computed}
    nets = {
        name: FeatureAutoencoder.from_pretrained(folder).to(device)
        for name, folder in (
            ("reconstruction", stages.AUTOENCODER),
            ("reconstruction_random", stages.RANDOM_MASKS),
        )
    }
    images, names, stored = _held_out(params, by_seed[0].needs, device)
    keep, overlap_keep = params.evaluate.keep, params.intrinsic.overlap_keep
    kept = intrinsic.kept_indices(by_seed, images, overlap_keep)
    stability = None
    if reducer == "selector" and (others := sorted(stages.RANDOM_MASKS.parent.glob("selector-*"))):
        stability = intrinsic.selector_stability(_selectors(others, device), images, keep)
    return {
        "lines": intrinsic.measure_lines(by_seed, nets, images, keep),
        "masks": {"keep": overlap_keep, "images": names, "kept": kept} if kept else None,
        "stability": stability,
        "left_out": "",
        "resolved": computed | {"features": stored},
    }


def _selectors(others: list[Any], device: "torch.device") -> list[Any]:
    """The selector of stage pretrain, and those trained with other seeds."""
    from atr.reduction import FeatureSelector
    from atr.stages import SELECTOR

    return [FeatureSelector.from_pretrained(folder).to(device) for folder in (SELECTOR, *others)]


def _held_out(
    params: config.Params, needs: Set[str], device: "torch.device"
) -> tuple[list["HeldOutBatch"], list[str], dict[str, Any]]:
    """Batches of evenly spaced held-out images, the image names, and how the features were computed."""
    from atr.datasets import PreparedImages, load_text_centres
    from atr.features.signals import load_store_encoder, observe_signals, sample_evenly
    from atr.features.store import FeatureStore
    from atr.reduction.intrinsic import HeldOutBatch

    store = FeatureStore.open(stages.EVALUATE_FEATURES, {"encoder": params.encoder.name})
    prepared, settings = PreparedImages(stages.EVALUATE_IMAGES), params.intrinsic
    text_centres = load_text_centres(stages.EVALUATE_IMAGES)
    encoder = cache(partial(load_store_encoder, store, params.encoder, stages.ENCODER_FOLDER, device))

    def batches() -> Iterator[HeldOutBatch]:
        for names in sample_evenly(store, settings.images, settings.batch_size):
            centres = [text_centres[name] for name in names]
            yield HeldOutBatch.of(
                observe_signals(store, names, prepared.image, encoder, needs, device), centres
            )

    names = [name for batch in sample_evenly(store, settings.images, settings.batch_size) for name in batch]
    return list(batches()), names, store.manifest["resolved"]


if __name__ == "__main__":
    stages.entry_of_reducer("intrinsic", main)
