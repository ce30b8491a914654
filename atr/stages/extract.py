"""Stage extract: encode the prepared images of one split with the frozen encoder into a feature store."""

import time
from argparse import ArgumentParser
from functools import partial
from typing import TYPE_CHECKING, Any

from atr import config
from atr.core.files import write_bytes
from atr.core.tower_layer import TowerLayer
from atr.stages import COMPONENTS, ENCODER_FOLDER, SPLITS, entry

if TYPE_CHECKING:
    from atr.config.presets import EncoderPreset

PICTURED = ("coffee", "flower")
"""Photographs in the PCA picture; the same for all encoders, so that they can be compared."""


def main(params: config.Params, split: str) -> None:
    """Encode the images of `split`, "pretrain" or "evaluate"; write the store's manifest last."""
    from atr.core import tracking

    with tracking.run("extract", params, part=split) as run:
        from atr.core.hardware import lightning_kwargs
        from atr.core.hub import checkpoint_version
        from atr.datasets import PreparedImages
        from atr.datasets.photographs import photograph
        from atr.features.datamodule import ImageDataModule
        from atr.features.encoder import Encoder
        from atr.features.extraction import fill_store
        from atr.features.image_shapes import check_shapes
        from atr.features.pca import pca_picture
        from atr.features.pixel_bounds import bound_area
        from atr.features.store import MANIFEST_FILE
        from atr.features.wheel_weights import resolve_weights

        kwargs, extract, (source, folder) = lightning_kwargs(params.trainer), params.extract, SPLITS[split]
        layer = params.encoder.layer if extract.layer is None else extract.layer
        path = resolve_weights(params.encoder.path, ENCODER_FOLDER, layer)
        encoder = Encoder.load(path, layer, params.encoder.name, params.encoder.size)
        bound_area(encoder.image_processor, params.encoder.min_pixels, params.encoder.max_pixels, path)
        images = PreparedImages(source, verify=tracking.is_first_process())
        data = ImageDataModule(
            images, encoder.preprocess, extract.batch_size, extract.shard_images, extract.workers
        )
        if tracking.is_first_process():
            if encoder.is_ragged:  # its processor may refuse shapes, which would show hours later
                check_shapes(encoder.preprocess, images.ids, images.sizes())
            write_bytes(folder / COMPONENTS, pca_picture(encoder, [photograph(name) for name in PICTURED]))
        started = time.monotonic()
        version = checkpoint_version(path) | _pixels(params.encoder)
        fill_store(encoder, data, folder, _parameters(params, layer), kwargs, version)
        run.metrics({"images": len(images), "images_per_second": len(images) / (time.monotonic() - started)})
        for name in (MANIFEST_FILE, COMPONENTS):
            run.artifact(folder / name, folder=f"features/{split}")


def _parameters(params: config.Params, layer: TowerLayer) -> dict[str, object]:
    """The parameters that the features depend on; readers of the store check them."""
    from atr.core.hardware import precision_of

    return {
        "encoder": params.encoder.name,
        "layer": layer,
        "precision": precision_of(params.trainer),
        "batch_size": params.extract.batch_size,
        "shard_images": params.extract.shard_images,
    }


def _pixels(encoder: "EncoderPreset") -> dict[str, Any]:
    """The bounds of an image's area, as stage evaluate records them; empty without any."""
    bounds = {"min_pixels": encoder.min_pixels, "max_pixels": encoder.max_pixels}
    return {"pixels": bounds} if any(bounds.values()) else {}


if __name__ == "__main__":
    parser = ArgumentParser(prog="atr.stages.extract", description=__doc__)
    parser.add_argument("split", choices=SPLITS)
    entry("extract", partial(main, split=parser.parse_args().split))
