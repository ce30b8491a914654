"""Stage micro, of data/micro/dvc.yaml: trains the micro world's vision-language model from nothing."""

from functools import partial
from pathlib import Path
from typing import Any

from atr import config
from atr.stages import entry

TRAINING = Path("data/micro/training")
MODEL = TRAINING / "llava"
CHECKPOINT = TRAINING / "checkpoints" / "last.ckpt"
VALIDATION_QUESTIONS = 64


def main(params: config.Params) -> None:
    """Write data/micro/training/llava: bfloat16 weights, processor, and a model card with held-out scores."""
    from lightning.pytorch import seed_everything

    from atr import tracking
    from atr.datasets import micro
    from atr.hardware import lightning_kwargs
    from atr.vlm.micro import build_model, build_processor
    from atr.vlm.training import MicroTraining, train

    recipe, seed = params.micro, params.seed
    with tracking.run("micro", params) as run:
        seed_everything(seed, workers=True, verbose=False)
        processor = build_processor((*micro.QUESTIONS, *micro.ANSWERS), micro.SIZE)
        model = build_model(processor, micro.SIZE, recipe.width, recipe.layers, recipe.text_layers).train()
        examine = partial(score, processor, split="validation", count=VALIDATION_QUESTIONS, seed=seed)
        module, draw = MicroTraining(model, recipe, examine), partial(micro.lesson, seed=seed)
        kwargs = lightning_kwargs(params.trainer)
        is_first = train(module, draw, processor, CHECKPOINT, run.logger(), kwargs)
        if not is_first:
            return
        run.metrics(_write(params, model, processor, module.seconds / 60))
        run.artifact(MODEL, folder="model")
        CHECKPOINT.unlink(missing_ok=True)


def _write(params: config.Params, model: Any, processor: Any, minutes: float) -> dict[str, float]:
    """The folder, whole or not at all; the held-out scores of what is in it, in float32."""
    import torch

    from atr.files import whole_folder, write_text
    from atr.vlm.card import card
    from atr.vlm.checkpoint import load_vlm

    with whole_folder(MODEL) as folder:
        model.bfloat16().save_pretrained(folder)
        processor.save_pretrained(folder)
        saved, loaded = load_vlm(str(folder), torch.float32)
        count, seed = params.micro.questions, params.seed
        held_out = partial(score, loaded, saved, split="evaluate", count=count, seed=seed)
        scores = {benchmark: held_out(benchmark=benchmark) for benchmark in config.BENCHMARKS}
        write_text(folder / "README.md", card(params, scores, minutes))
    return scores


def score(processor: Any, model: Any, benchmark: str, split: str, count: int, seed: int) -> float:
    """Exact match of greedy answers to one question of each of `count` images."""
    from atr.benchmarks.metrics import ExactMatch
    from atr.datasets import micro
    from atr.vlm.micro import answers

    samples = [micro.sample(benchmark, split, index, seed) for index in range(count)]
    said = answers(model, processor, [s.image for s in samples], [s.turns[0][0] for s in samples])
    metric = ExactMatch()
    metric.update(said, [[sample.turns[0][1]] for sample in samples])
    return metric.compute().item()


if __name__ == "__main__":
    entry("micro", main)
