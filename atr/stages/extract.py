"""Stage extract: the prepared images of one split through the frozen encoder into a feature store."""

import time
from argparse import ArgumentParser
from functools import partial

from atr import config
from atr.core.files import write_bytes
from atr.stages import COMPONENTS, ENCODERS, SPLITS, entry

PICTURED = ("coffee", "flower")
"""The same photographs whatever is encoded, so that encoders can be compared."""


def main(params: config.Params, split: str) -> None:
    """Encode the images of `split`, "pretrain" or "evaluate"; the manifest, written last, ends the store."""
    from atr.core import tracking

    with tracking.run("extract", params, part=split) as run:
        from atr.core.hardware import lightning_kwargs
        from atr.core.hub import version_of
        from atr.datasets import PreparedImages
        from atr.datasets.photographs import photograph
        from atr.features.datamodule import ImageDataModule
        from atr.features.encoder import Encoder
        from atr.features.extraction import fill_store
        from atr.features.pca import components
        from atr.features.store import MANIFEST
        from atr.features.wheel_weights import locate

        kwargs, extract, (source, folder) = lightning_kwargs(params.trainer), params.extract, SPLITS[split]
        layer = params.encoder.layer if extract.layer is None else extract.layer
        path = locate(params.encoder.path, ENCODERS, layer)
        encoder = Encoder.load(path, layer, params.encoder.name, params.encoder.size)
        images = PreparedImages(source, verify=tracking.is_first_process())
        data = ImageDataModule(
            images, encoder.preprocess, extract.batch_size, extract.shard_images, extract.workers
        )
        if tracking.is_first_process():
            pictured = [photograph(name) for name in PICTURED]
            write_bytes(folder / COMPONENTS, components(encoder, pictured))
        started = time.monotonic()
        fill_store(encoder, data, folder, _parameters(params, layer), kwargs, version_of(path))
        run.metrics({"images": len(images), "images_per_second": len(images) / (time.monotonic() - started)})
        for name in (MANIFEST, COMPONENTS):
            run.artifact(folder / name, folder=f"features/{split}")


def _parameters(params: config.Params, layer: int) -> dict[str, object]:
    """What the features depend on, for readers of the store to ask for; the devices are not among it."""
    from atr.core.hardware import precision_of

    return {
        "encoder": params.encoder.name,
        "layer": layer,
        "precision": precision_of(params.trainer),
        "batch_size": params.extract.batch_size,
        "shard_images": params.extract.shard_images,
    }


if __name__ == "__main__":
    parser = ArgumentParser(prog="atr.stages.extract", description=__doc__)
    parser.add_argument("split", choices=SPLITS)
    entry("extract", partial(main, split=parser.parse_args().split))
