"""Stage micro, of data/micro/dvc.yaml: trains the micro world's vision-language model from nothing."""

import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atr import config
from atr.stages import entry

if TYPE_CHECKING:
    from atr.datasets.micro import Sample

TRAINING = Path("data/micro/training")
MODEL = TRAINING / "llava"
CHECKPOINT = TRAINING / "checkpoints" / "last.ckpt"
VALIDATION_QUESTIONS = 64


def main(params: config.Params) -> None:
    """Write data/micro/training/llava: bfloat16 weights, processor, and a model card with held-out scores."""
    from lightning.pytorch import seed_everything

    from atr import tracking
    from atr.datasets import micro
    from atr.files import whole_folder, write_text
    from atr.vlm.card import card
    from atr.vlm.checkpoint import load_vlm, weight_dtype
    from atr.vlm.micro import build_model, build_processor
    from atr.vlm.training import MicroTraining, train

    recipe, seed = params.micro, params.seed
    with tracking.run("micro", params) as run:
        seed_everything(seed, workers=True, verbose=False)
        processor = build_processor((*micro.QUESTIONS, *micro.ANSWERS), micro.SIZE)
        model = build_model(processor, micro.SIZE, recipe.width, recipe.layers).train()
        started = time.monotonic()
        examine = partial(
            score, processor=processor, split="validation", count=VALIDATION_QUESTIONS, seed=seed
        )
        module = MicroTraining(model, recipe, examine)
        draw = partial(lesson, recipe=recipe, seed=seed)
        is_first = train(module, draw, processor, CHECKPOINT, run.logger(), params.trainer.kwargs())
        if not is_first:
            return
        minutes = (time.monotonic() - started) / 60
        with whole_folder(MODEL) as folder:
            model.bfloat16().save_pretrained(folder)
            processor.save_pretrained(folder)
            saved, loaded = load_vlm(str(folder), weight_dtype(params.trainer.precision))
            measured = {
                benchmark: score(saved, benchmark, loaded, "evaluate", recipe.questions, seed)
                for benchmark in config.BENCHMARKS
            }
            write_text(folder / "README.md", card(params, measured, minutes))
        run.metrics(measured)
        run.artifact(MODEL, folder="model")
        CHECKPOINT.unlink(missing_ok=True)


def lesson(index: int, recipe: config.Micro, seed: int) -> "Sample":
    """The lesson at `index` of the whole training; fewer pages are transcribed in its second half."""
    from atr.datasets import micro

    step = index // recipe.batch_size
    reading = step < round(recipe.steps * recipe.reading)
    return micro.lesson(index, seed, reading, transcribe=0.4 if step < recipe.steps / 2 else 0.2)


def score(
    model: Any,
    benchmark: str,
    processor: Any,
    split: str,
    count: int,
    seed: int,
) -> float:
    """Exact match of greedy answers to one question of each of `count` images."""
    from atr.datasets import micro
    from atr.vlm.micro import answers

    asked = [micro.sample(benchmark, split, index, seed) for index in range(count)]
    questions, right = zip(*(sample.turns[0] for sample in asked), strict=True)
    said = answers(model, processor, [sample.image for sample in asked], questions)
    matches: list[bool] = [a == b for a, b in zip(said, right, strict=True)]
    return sum(matches) / count


if __name__ == "__main__":
    entry("micro", main)
