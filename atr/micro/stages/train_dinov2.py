"""Stage micro_dinov2, of `make micro-dinov2`: trains the model that reads the frozen dinov2-small."""

from functools import partial
from typing import Any

from atr import config
from atr.core.files import read_json
from atr.micro.stages.features import ENCODER, FEATURES, parameters
from atr.micro.stages.probe import PROBE
from atr.micro.stages.train import TRAINING, VALIDATION_QUESTIONS, score, write
from atr.stages import ENCODERS, depends_on, entry

LANGUAGE_MODEL = config.VLMS["micro"].path
MODEL, CHECKPOINTS = TRAINING / "llava-dinov2", TRAINING / "checkpoints" / "llava-dinov2"
MEASURED_IMAGES = 512  # of the store, evenly spread: enough for the mean and deviation of each channel


def main(params: config.Params) -> None:
    """Write data/micro/training/llava-dinov2: all but the tower, as stage micro does, on stored features."""
    import torch
    from lightning.pytorch import seed_everything

    from atr.core import tracking
    from atr.core.hardware import lightning_kwargs
    from atr.features.store import MANIFEST_FILE, FeatureStore
    from atr.features.wheel_weights import resolve_weights
    from atr.micro import world
    from atr.micro.curriculum import StoredLessons
    from atr.micro.model import folded
    from atr.micro.model_card import card_dinov2
    from atr.micro.training import MicroTraining, stored_states, train
    from atr.reduction.checkpoints import Checkpoints
    from atr.reduction.layers import Standardise
    from atr.vlm.checkpoint import load_vlm
    from atr.vlm.external_tower import save_without_tower

    recipe, seed, probe = params.micro_dinov2, params.seed, read_json(PROBE)
    with tracking.run("micro_dinov2", params) as run:
        store = FeatureStore.open(FEATURES, parameters(params), verify=tracking.is_first_process())
        seed_everything(seed, workers=True, verbose=False)
        at = partial(resolve_weights, folder=ENCODERS)
        model, processor = _build(at(ENCODER.path), recipe.new_layers)
        standardise, step = Standardise(store.width), max(1, len(store) // MEASURED_IMAGES)
        standardise.measure(store[position] for position in range(0, len(store), step))

        def examine(model: Any, benchmark: str) -> float:
            whole = folded(model, standardise, torch.float32)
            return score(processor, whole, benchmark, "validation", VALIDATION_QUESTIONS, seed)

        see = partial(stored_states, standardise)
        module = MicroTraining(model.train(), recipe, examine, see, recipe.new_layers)
        draw = partial(world.lesson, seed=seed, charts=params.micro_features.charts)
        lessons = StoredLessons(draw, store, params.micro_features.reading_images, recipe)
        checkpoints = Checkpoints(CHECKPOINTS, **depends_on(params, FEATURES / MANIFEST_FILE, LANGUAGE_MODEL))
        train(module, lessons, processor, checkpoints, run.logger(), lightning_kwargs(params.trainer))
        save = partial(save_without_tower, folded(model, standardise, torch.bfloat16))
        held_out = partial(score, split="evaluate", count=recipe.questions, seed=seed)
        text = partial(card_dinov2, params, probe, minutes=module.seconds / 60)
        run.metrics(write(MODEL, processor, save, partial(load_vlm, resolve_weights=at), held_out, text))
        run.artifact(MODEL, folder="model")


def _build(path: str, new_layers: int) -> tuple[Any, Any]:
    """Model and processor on the encoder whose weights lie at `path`; the shipped model's language model."""
    import torch

    from atr.features.encoder import load_image_processor
    from atr.micro import world
    from atr.micro.model import build_model_on, build_processor
    from atr.vlm.checkpoint import load_vlm

    size, images = ENCODER.size, load_image_processor(path, ENCODER.size)
    assert size is not None
    processor = build_processor((*world.QUESTIONS, *world.ANSWERS), size, images)
    learned, _ = load_vlm(LANGUAGE_MODEL, torch.float32)
    return build_model_on(ENCODER.path, path, ENCODER.layer, processor, size, learned, new_layers), processor


if __name__ == "__main__":
    entry("micro_dinov2", main)
