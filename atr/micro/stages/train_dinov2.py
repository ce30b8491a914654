"""Step micro_dinov2 of `make micro-dinov2`: trains the model that reads the frozen dinov2-small."""

from functools import partial
from typing import Any

from atr.config.presets import VLMS
from atr.core.files import read_json
from atr.micro.params import MicroParams, load_micro_or_exit
from atr.micro.stages.features import ENCODER, FEATURES, store_parameters
from atr.micro.stages.probe import PROBE
from atr.micro.stages.train import TRAINING, VALIDATION_QUESTIONS
from atr.stages import ENCODER_FOLDER, depends_on, entry

LANGUAGE_MODEL = VLMS["micro"].path
MODEL, CHECKPOINTS = TRAINING / "llava-dinov2", TRAINING / "checkpoints" / "llava-dinov2"


def main(params: MicroParams) -> None:
    """Write data/micro/training/llava-dinov2, as step micro does, without the tower's weights."""
    import torch
    from lightning.pytorch import seed_everything

    from atr.core import tracking
    from atr.core.hardware import lightning_kwargs
    from atr.features.store import MANIFEST_FILE, FeatureStore
    from atr.features.wheel_weights import resolve_weights
    from atr.micro.curriculum import StoredLessons
    from atr.micro.lessons import draw_lesson
    from atr.micro.model_card import render_dinov2_card
    from atr.micro.model_folder import write_model_folder
    from atr.micro.standardisation import fold_standardisation, measure_standardisation
    from atr.micro.training import train_micro_model
    from atr.reduction.checkpoints import Checkpoints
    from atr.vlm.checkpoint import load_vlm
    from atr.vlm.external_tower import save_without_tower

    features, seed, probe = params.micro_features, params.seed, read_json(PROBE)
    with tracking.run("micro_dinov2", params) as run:
        store = FeatureStore.open(FEATURES, store_parameters(params), verify=tracking.is_first_process())
        seed_everything(seed, workers=True, verbose=False)
        load, standardise = (
            partial(load_vlm, resolve_weights=partial(resolve_weights, folder=ENCODER_FOLDER)),
            measure_standardisation(store),
        )
        module, processor = _build(params, resolve_weights(ENCODER.path, ENCODER_FOLDER), standardise)
        draw = partial(draw_lesson, seed=seed, charts=features.charts)
        lessons = StoredLessons(draw, store, features.reading_images, module.recipe)
        checkpoints = Checkpoints(CHECKPOINTS, **depends_on(params, FEATURES / MANIFEST_FILE, LANGUAGE_MODEL))
        kwargs = lightning_kwargs(params.trainer)
        train_micro_model(module, lessons, processor, checkpoints, run.logger(), kwargs)
        save = partial(save_without_tower, fold_standardisation(module.model, standardise, torch.bfloat16))
        render = partial(render_dinov2_card, params, probe, minutes=module.seconds / 60)
        questions = params.micro_dinov2.questions
        run.metrics(write_model_folder(MODEL, processor, save, load, questions, seed, render))
        run.artifact(MODEL, folder="model")


def _build(params: MicroParams, path: str, standardise: Any) -> tuple[Any, Any]:
    """The training module around a model on the encoder at `path`, and its processor.

    The language model is that of the shipped micro model. Validation scores the model as it will be saved.
    """
    import torch

    from atr.features.encoder import load_image_processor
    from atr.micro.model import build_model_on_tower, build_processor
    from atr.micro.scoring import score_benchmark
    from atr.micro.standardisation import fold_standardisation
    from atr.micro.training import MicroTraining, encode_stored
    from atr.micro.vocabulary import VOCABULARY
    from atr.vlm.checkpoint import load_vlm

    recipe, size, layer = params.micro_dinov2, ENCODER.size, ENCODER.layer
    assert size is not None and isinstance(layer, int)
    processor = build_processor(VOCABULARY, size, load_image_processor(path, size))
    trained, _ = load_vlm(LANGUAGE_MODEL, torch.float32)
    model = build_model_on_tower(ENCODER.path, path, layer, processor, size, trained, recipe.new_layers)

    def score(model: Any, benchmark: str) -> float:
        folded = fold_standardisation(model, standardise, torch.float32)
        return score_benchmark(processor, folded, benchmark, "validation", VALIDATION_QUESTIONS, params.seed)

    encode = partial(encode_stored, standardise)
    return MicroTraining(model.train(), recipe, score, encode, recipe.new_layers), processor


if __name__ == "__main__":
    entry("micro_dinov2", main, load_micro_or_exit)
