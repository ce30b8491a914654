"""Stage micro, of `make micro`: trains the micro world's vision-language model from nothing."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from atr.core.files import whole_folder, write_text
from atr.micro.params import MicroParams, load_or_exit
from atr.stages import depends_on, entry

TRAINING = Path("data/micro/training")
MODEL, CHECKPOINTS = TRAINING / "llava", TRAINING / "checkpoints" / "llava"
VALIDATION_QUESTIONS = 64


def main(params: MicroParams) -> None:
    """Write data/micro/training/llava: bfloat16 weights, processor, and a model card with held-out scores."""
    from lightning.pytorch import seed_everything

    from atr.core import tracking
    from atr.core.hardware import lightning_kwargs
    from atr.micro import world
    from atr.micro.curriculum import LessonDataset
    from atr.micro.model import build_model, build_processor
    from atr.micro.model_card import card
    from atr.micro.training import MicroTraining, tower_states, train
    from atr.reduction.checkpoints import Checkpoints
    from atr.vlm.checkpoint import load_vlm

    recipe, seed, checkpoints = params.micro, params.seed, Checkpoints(CHECKPOINTS, **depends_on(params))
    with tracking.run("micro", params) as run:
        seed_everything(seed, workers=True, verbose=False)
        processor = build_processor((*world.QUESTIONS, *world.ANSWERS), world.SIZE)
        model = build_model(processor, world.SIZE, recipe.width, recipe.layers, recipe.text_layers).train()
        examine = partial(score, processor, split="validation", count=VALIDATION_QUESTIONS, seed=seed)
        see = partial(tower_states, model, recipe.reading_layer, recipe.naming_layer)
        module = MicroTraining(model, recipe, examine, see)
        lessons = LessonDataset(partial(world.lesson, seed=seed), recipe)
        train(module, lessons, processor, checkpoints, run.logger(), lightning_kwargs(params.trainer))
        held_out = partial(score, split="evaluate", count=recipe.questions, seed=seed)
        save, text = model.bfloat16().save_pretrained, partial(card, params, minutes=module.seconds / 60)
        run.metrics(write(MODEL, processor, save, load_vlm, held_out, text))
        run.artifact(MODEL, folder="model")


def write(
    home: Path,
    processor: Any,
    save: Callable[[Path], None],
    load: Callable[..., tuple[Any, Any]],
    examine: Callable[..., float],
    card: Callable[[Mapping[str, float]], str],
) -> dict[str, float]:
    """The folder `home`, whole or not at all; the scores by benchmark of what is in it, in float32."""
    import torch

    from atr.micro import world

    with whole_folder(home) as folder:
        save(folder)
        processor.save_pretrained(folder)
        model, saved = load(str(folder), torch.float32)
        scores = {benchmark: examine(saved, model, benchmark) for benchmark in world.DRAW}
        write_text(folder / "README.md", card(scores))
    return scores


def score(processor: Any, model: Any, benchmark: str, split: str, count: int, seed: int) -> float:
    """Exact match of greedy answers to one question of each of `count` images."""
    from atr.benchmarks.metrics import exact_match
    from atr.micro import world
    from atr.micro.model import answers

    samples = [world.sample(benchmark, split, index, seed) for index in range(count)]
    asked = [sample.turns[0] for sample in samples]
    said = answers(model, processor, [sample.image for sample in samples], [turn[0] for turn in asked])
    return sum(exact_match(one, [turn[1]]) for one, turn in zip(said, asked, strict=True)) / count


if __name__ == "__main__":
    entry("micro", main, load_or_exit)
