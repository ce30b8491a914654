"""Stage micro_dinov2, of `make micro-dinov2`: trains the model that reads the frozen dinov2-small."""

from functools import partial
from typing import Any

from atr import config
from atr.core.files import read_json
from atr.micro.stages.features import ENCODER, FEATURES, store_parameters
from atr.micro.stages.probe import PROBE
from atr.micro.stages.train import TRAINING, VALIDATION_QUESTIONS, write_model
from atr.stages import ENCODERS, depends_on, entry

LANGUAGE_MODEL = config.VLMS["micro"].path
MODEL, CHECKPOINTS = TRAINING / "llava-dinov2", TRAINING / "checkpoints" / "llava-dinov2"
STATISTICS_IMAGES = 512
"""Images of the store, evenly spaced, that give the mean and deviation of each channel."""


def main(params: config.Params) -> None:
    """Write data/micro/training/llava-dinov2, as stage micro does, without the tower's weights."""
    import torch
    from lightning.pytorch import seed_everything

    from atr.core import tracking
    from atr.core.hardware import lightning_kwargs
    from atr.features.store import MANIFEST, FeatureStore
    from atr.features.wheel_weights import locate
    from atr.micro.curriculum import StoredLessons
    from atr.micro.lessons import draw_lesson
    from atr.micro.model import fold_standardisation
    from atr.micro.model_card import render_dinov2_card
    from atr.micro.training import train_micro_model
    from atr.reduction.checkpoints import Checkpoints
    from atr.vlm.checkpoint import load_vlm
    from atr.vlm.external_tower import save_without_tower

    recipe, seed, probe = params.micro_dinov2, params.seed, read_json(PROBE)
    with tracking.run("micro_dinov2", params) as run:
        store = FeatureStore.open(FEATURES, store_parameters(params), verify=tracking.is_first_process())
        seed_everything(seed, workers=True, verbose=False)
        resolve = partial(locate, folder=ENCODERS)
        model, processor = _build_model(resolve(ENCODER.path), recipe.new_layers)
        standardise = _measure_standardisation(store)
        module = _build_module(params, model, processor, standardise)
        draw = partial(draw_lesson, seed=seed, charts=params.micro_features.charts)
        lessons = StoredLessons(draw, store, params.micro_features.reading_images, recipe)
        checkpoints = Checkpoints(CHECKPOINTS, **depends_on(params, FEATURES / MANIFEST, LANGUAGE_MODEL))
        kwargs = lightning_kwargs(params.trainer)
        train_micro_model(module, lessons, processor, checkpoints, run.logger(), kwargs)
        save = partial(save_without_tower, fold_standardisation(model, standardise, torch.bfloat16))
        load = partial(load_vlm, locate=resolve)
        render = partial(render_dinov2_card, params, probe, minutes=module.seconds / 60)
        run.metrics(write_model(MODEL, processor, save, load, recipe.questions, seed, render))
        run.artifact(MODEL, folder="model")


def _build_model(path: str, new_layers: int) -> tuple[Any, Any]:
    """Model and processor on the encoder at `path`, with the language model of the shipped micro model."""
    import torch

    from atr.features.encoder import load_image_processor
    from atr.micro.model import build_model_on_tower, build_processor
    from atr.micro.vocabulary import VOCABULARY
    from atr.vlm.checkpoint import load_vlm

    size = ENCODER.size
    assert size is not None
    processor = build_processor(VOCABULARY, size, load_image_processor(path, size))
    trained, _ = load_vlm(LANGUAGE_MODEL, torch.float32)
    model = build_model_on_tower(ENCODER.path, path, ENCODER.layer, processor, size, trained, new_layers)
    return model, processor


def _measure_standardisation(store: Any) -> Any:
    """Mean and deviation of each channel of the stored features."""
    from atr.reduction.layers import Standardise

    standardise, step = Standardise(store.width), max(1, len(store) // STATISTICS_IMAGES)
    standardise.measure(store[position] for position in range(0, len(store), step))
    return standardise


def _build_module(params: config.Params, model: Any, processor: Any, standardise: Any) -> Any:
    """The training module; it validates the model that takes raw features, as it will be saved."""
    import torch

    from atr.micro.model import fold_standardisation
    from atr.micro.scoring import score_benchmark
    from atr.micro.training import MicroTraining, encode_stored

    def score(model: Any, benchmark: str) -> float:
        folded = fold_standardisation(model, standardise, torch.float32)
        return score_benchmark(processor, folded, benchmark, "validation", VALIDATION_QUESTIONS, params.seed)

    recipe, encode = params.micro_dinov2, partial(encode_stored, standardise)
    return MicroTraining(model.train(), recipe, score, encode, recipe.new_layers)


if __name__ == "__main__":
    entry("micro_dinov2", main)
