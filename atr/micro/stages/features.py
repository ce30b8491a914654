"""Step micro_features of `make micro-dinov2`: encodes the lessons' images with dinov2-small."""

import time
from pathlib import Path

from atr.config.presets import ENCODERS as PRESETS
from atr.micro.params import MicroParams, load_micro_or_exit
from atr.stages import ENCODER_FOLDER, entry

FEATURES = Path("data/micro/training/features")
ENCODER = PRESETS["dinov2-small"]
SHARD_IMAGES = 1024


def main(params: MicroParams) -> None:
    """Write the feature store data/micro/training/features, without the lessons' questions."""
    from atr.core import tracking

    with tracking.run("micro_features", params) as run:
        from atr.core.hardware import lightning_kwargs
        from atr.core.hub import checkpoint_version
        from atr.features.datamodule import ImageDataModule
        from atr.features.encoder import Encoder
        from atr.features.extraction import fill_store
        from atr.features.wheel_weights import resolve_weights
        from atr.micro.lessons import LessonImages

        section, kwargs = params.micro_features, lightning_kwargs(params.trainer)
        path = resolve_weights(ENCODER.path, ENCODER_FOLDER)
        encoder = Encoder.load(path, ENCODER.layer, ENCODER.name, ENCODER.size)
        images = LessonImages(section.images, section.reading_images, params.seed, section.charts)
        data = ImageDataModule(images, encoder.preprocess, section.batch_size, SHARD_IMAGES, section.workers)
        started = time.monotonic()
        fill_store(encoder, data, FEATURES, store_parameters(params), kwargs, checkpoint_version(path))
        run.metrics({"images": len(images), "images_per_second": len(images) / (time.monotonic() - started)})


def store_parameters(params: MicroParams) -> dict[str, object]:
    """Parameters of the images and their features; step micro_dinov2 refuses a store with other ones."""
    section = params.micro_features
    return {
        "encoder": ENCODER.name,
        "layer": ENCODER.layer,
        "size": ENCODER.size,
        "seed": params.seed,
        "images": section.images,
        "reading_images": section.reading_images,
        "charts": section.charts,
    }


if __name__ == "__main__":
    entry("micro_features", main, load_micro_or_exit)
