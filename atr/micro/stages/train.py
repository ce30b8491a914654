"""Step micro, `make micro`: trains the micro world's vision-language model from scratch."""

from functools import partial
from pathlib import Path
from typing import Any

from atr.micro.params import MicroParams, load_micro_or_exit
from atr.stages import depends_on, entry

TRAINING = Path("data/micro/training")
MODEL, CHECKPOINTS = TRAINING / "llava", TRAINING / "checkpoints" / "llava"
VALIDATION_QUESTIONS = 64


def main(params: MicroParams) -> None:
    """Write data/micro/training/llava: bfloat16 weights, processor, and a model card with held-out scores."""
    from lightning.pytorch import seed_everything

    from atr.core import tracking
    from atr.core.hardware import lightning_kwargs
    from atr.micro.curriculum import LessonDataset
    from atr.micro.lessons import draw_lesson
    from atr.micro.model_card import render_card
    from atr.micro.model_folder import write_model_folder
    from atr.micro.training import train_micro_model
    from atr.reduction.checkpoints import Checkpoints
    from atr.vlm.checkpoint import load_vlm

    recipe, seed, checkpoints = params.micro, params.seed, Checkpoints(CHECKPOINTS, **depends_on(params))
    with tracking.run("micro", params) as run:
        seed_everything(seed, workers=True, verbose=False)
        module, processor = _build(params)
        lessons, kwargs = (
            LessonDataset(partial(draw_lesson, seed=seed), recipe),
            lightning_kwargs(params.trainer),
        )
        train_micro_model(module, lessons, processor, checkpoints, run.logger(), kwargs)
        save = module.model.bfloat16().save_pretrained
        render = partial(render_card, params, minutes=module.seconds / 60)
        run.metrics(write_model_folder(MODEL, processor, save, load_vlm, recipe.questions, seed, render))
        run.artifact(MODEL, folder="model")


def _build(params: MicroParams) -> tuple[Any, Any]:
    """The training module around a new model, and its processor."""
    from atr.micro.drawing import SIZE
    from atr.micro.model import build_model, build_processor
    from atr.micro.scoring import score_benchmark
    from atr.micro.training import MicroTraining, encode_pictures
    from atr.micro.vocabulary import VOCABULARY

    recipe, processor = params.micro, build_processor(VOCABULARY, SIZE)
    model = build_model(processor, SIZE, recipe.width, recipe.layers, recipe.text_layers).train()
    count, seed = VALIDATION_QUESTIONS, params.seed
    score = partial(score_benchmark, processor, split="validation", count=count, seed=seed)
    encode = partial(encode_pictures, model, recipe.reading_layer, recipe.naming_layer)
    return MicroTraining(model, recipe, score, encode), processor


if __name__ == "__main__":
    entry("micro", main, load_micro_or_exit)
