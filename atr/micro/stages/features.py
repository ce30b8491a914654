"""Stage micro_features, of `make micro-dinov2`: the lessons' images through the frozen dinov2-small, once."""

import time
from pathlib import Path

from atr.config.presets import ENCODERS as PRESETS
from atr.micro.params import MicroParams, load_or_exit
from atr.stages import ENCODERS, entry

FEATURES = Path("data/micro/training/features")
ENCODER = PRESETS["dinov2-small"]
SHARD_IMAGES = 1024


def main(params: MicroParams) -> None:
    """Write the store data/micro/training/features; the lessons are drawn again from their index."""
    from atr.core import tracking

    with tracking.run("micro_features", params) as run:
        from atr.core.hardware import lightning_kwargs
        from atr.core.hub import version_of
        from atr.features.datamodule import ImageDataModule
        from atr.features.encoder import Encoder
        from atr.features.extraction import fill_store
        from atr.features.wheel_weights import locate
        from atr.micro.world import LessonImages

        wanted, kwargs = params.micro_features, lightning_kwargs(params.trainer)
        path = locate(ENCODER.path, ENCODERS)
        encoder = Encoder.load(path, ENCODER.layer, ENCODER.name, ENCODER.size)
        images = LessonImages(wanted.images, wanted.reading_images, params.seed, wanted.charts)
        data = ImageDataModule(images, encoder.preprocess, wanted.batch_size, SHARD_IMAGES, wanted.workers)
        started = time.monotonic()
        fill_store(encoder, data, FEATURES, parameters(params), kwargs, version_of(path))
        run.metrics({"images": len(images), "images_per_second": len(images) / (time.monotonic() - started)})


def parameters(params: MicroParams) -> dict[str, object]:
    """What the images and their features depend on, for the training to ask for."""
    wanted = params.micro_features
    return {
        "encoder": ENCODER.name,
        "layer": ENCODER.layer,
        "size": ENCODER.size,
        "seed": params.seed,
        "images": wanted.images,
        "reading_images": wanted.reading_images,
        "charts": wanted.charts,
    }


if __name__ == "__main__":
    entry("micro_features", main, load_or_exit)
