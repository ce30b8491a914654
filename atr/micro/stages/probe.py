"""Stage micro_probe, of `make micro-probe`: which layer of dinov2-small can be read, at which size."""

from functools import partial
from pathlib import Path

from atr import config
from atr.core.files import write_json
from atr.stages import ENCODERS, entry

PROBE = Path("data/micro/probe.json")
ENCODER = config.ENCODERS["dinov2-small"]


def main(params: config.Params) -> None:
    """Write data/micro/probe.json: the fraction of characters read right, by image size and layer."""
    from atr.core import tracking
    from atr.features.encoder import Encoder
    from atr.features.wheel_weights import resolve_weights
    from atr.micro import world
    from atr.micro.curriculum import Collator
    from atr.micro.model import build_processor
    from atr.micro.probe import accuracies, written

    probe, seed = params.micro_probe, params.seed
    with tracking.run("micro_probe", params) as run:
        path = resolve_weights(ENCODER.path, ENCODERS)
        tokenizer = build_processor((*world.QUESTIONS, *world.ANSWERS), world.SIZE).tokenizer
        lesson = partial(world.lesson, seed=seed, reading=True, transcribe=0.0)
        held_out = range(probe.images, probe.images + probe.images // 4)
        accuracy: dict[str, dict[str, float]] = {}
        for size in probe.sizes:
            encoder, collate = Encoder.load(path, -1, ENCODER.name, size), Collator(tokenizer, size, 0)
            seen, unseen = (
                written(encoder, [lesson(index) for index in indices], collate)
                for indices in (range(probe.images), held_out)
            )
            layers = accuracies(seen, unseen, seed)
            accuracy[str(size)] = {str(layer): round(right, 4) for layer, right in enumerate(layers, 1)}
            for layer, right in enumerate(layers, 1):
                run.metrics({f"read_at_{size}": right}, layer)
        write_json(PROBE, {"encoder": ENCODER.name, "images": probe.images, "accuracy": accuracy})


if __name__ == "__main__":
    entry("micro_probe", main)
