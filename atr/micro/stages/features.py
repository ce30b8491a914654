"""Stage micro_features, of `make micro-dinov2`: the lessons' images through the frozen dinov2-small, once."""

import time
from pathlib import Path

from atr import config
from atr.stages import ENCODERS, entry

FEATURES = Path("data/micro/training/features")
ENCODER = config.ENCODERS["dinov2-small"]
SHARD_IMAGES = 1024


def main(params: config.Params) -> None:
    """Write the store data/micro/training/features; the lessons are drawn again from their index."""
    from atr.core import tracking

    with tracking.run("micro_features", params) as run:
        from atr.core.hardware import lightning_kwargs
        from atr.core.hub import checkpoint_version
        from atr.features.datamodule import ImageDataModule
        from atr.features.encoder import Encoder
        from atr.features.extraction import fill_store
        from atr.features.wheel_weights import resolve_weights
        from atr.micro.world import LessonImages

        wanted, kwargs = params.micro_features, lightning_kwargs(params.trainer)
        path = resolve_weights(ENCODER.path, ENCODERS)
        encoder = Encoder.load(path, ENCODER.layer, ENCODER.name, ENCODER.size)
        images = LessonImages(wanted.images, wanted.reading_images, params.seed, wanted.charts)
        data = ImageDataModule(images, encoder.preprocess, wanted.batch_size, SHARD_IMAGES, wanted.workers)
        started = time.monotonic()
        fill_store(encoder, data, FEATURES, parameters(params), kwargs, checkpoint_version(path))
        run.metrics({"images": len(images), "images_per_second": len(images) / (time.monotonic() - started)})


def parameters(params: config.Params) -> dict[str, object]:
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
    entry("micro_features", main)
