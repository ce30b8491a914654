"""Step micro_probe, `make micro-probe`: how well characters can be read at each layer of dinov2-small."""

from functools import partial
from pathlib import Path

from atr.core.files import write_json
from atr.micro.params import MicroParams, load_micro_or_exit
from atr.micro.stages.features import ENCODER
from atr.stages import ENCODER_FOLDER, entry

PROBE = Path("data/micro/probe.json")


def main(params: MicroParams) -> None:
    """Write data/micro/probe.json: the fraction of characters read correctly, by image size and layer."""
    from atr.core import tracking
    from atr.features.wheel_weights import resolve_weights

    probe, accuracy = params.micro_probe, {}
    with tracking.run("micro_probe", params) as run:
        path = resolve_weights(ENCODER.path, ENCODER_FOLDER)
        for size in probe.sizes:
            by_layer = _probe_size(path, size, probe.images, params.seed)
            accuracy[str(size)] = {str(layer): round(value, 4) for layer, value in by_layer.items()}
            for layer, value in by_layer.items():
                run.metrics({f"read_at_{size}": value}, layer)
        write_json(PROBE, {"encoder": ENCODER.name, "images": probe.images, "accuracy": accuracy})


def _probe_size(path: str, size: int, images: int, seed: int) -> dict[int, float]:
    """Accuracy by layer of the encoder at `path` on images of one size in pixels.

    Probes are trained on the first `images` lessons and evaluated on the `images // 4` that follow.
    """
    from atr.features.encoder import Encoder
    from atr.micro.drawing import SIZE
    from atr.micro.lessons import draw_lesson
    from atr.micro.model import build_processor
    from atr.micro.probe import collect_text_patches, measure_accuracies
    from atr.micro.targets import Collator
    from atr.micro.vocabulary import VOCABULARY

    encoder = Encoder.load(path, -1, ENCODER.name, size)
    collate = Collator(build_processor(VOCABULARY, SIZE).tokenizer, size, 0)
    draw = partial(draw_lesson, seed=seed, reading=True, transcribe=0.0)
    training, held_out = (
        collect_text_patches(encoder, [draw(index) for index in indices], collate)
        for indices in (range(images), range(images, images + images // 4))
    )
    return dict(enumerate(measure_accuracies(training, held_out, seed), start=1))


if __name__ == "__main__":
    entry("micro_probe", main, load_micro_or_exit)
