"""Extracts features by Lightning's predict loop: the module, and the callback that writes the store.

Shapes: see atr.core.tokens.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from atr.core.fingerprint import fingerprint
from atr.core.hardware import resolved
from atr.core.ragged import Grid
from atr.features.datamodule import ImageBatch, ImageDataModule
from atr.features.encoder import Encoder
from atr.features.preprocess import describe_preprocessing
from atr.features.store import STORE_DTYPE, RaggedShardWriter, ShardWriter, clear_store, write_manifest


class FeatureExtraction(LightningModule):
    """Encodes batches on the trainer's device, in its precision."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def predict_step(self, batch: ImageBatch, batch_idx: int) -> Tensor | list[tuple[Tensor, Grid]]:
        """features_BND in the store's dtype; features_ND and grid of each image if these differ in size."""
        _, _, inputs = batch
        if self.encoder.is_ragged:
            return [(features_ND.to(STORE_DTYPE), grid) for features_ND, grid in self.encoder.images(inputs)]
        features_BND: Tensor = self.encoder(inputs)
        return features_BND.to(STORE_DTYPE)


class StoreWriter(Callback):
    """Writes each rank's shards as they fill; `finish` completes the store with its manifest."""

    def __init__(self, folder: Path, images: int, shard_images: int, is_ragged: bool = False) -> None:
        self.folder = folder
        self.writer: ShardWriter | RaggedShardWriter
        if is_ragged:
            self.writer = RaggedShardWriter(folder, images, shard_images)
        else:
            self.writer = ShardWriter(folder, images, shard_images)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove an existing store before any rank writes."""
        if trainer.is_global_zero:
            clear_store(self.folder)
        trainer.strategy.barrier("former store removed")

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: ImageBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add the batch to its shard."""
        first, ids, _ = batch
        if isinstance(self.writer, RaggedShardWriter):
            features, grids = zip(*outputs, strict=True)
            self.writer.add(first, ids, [features_ND.cpu() for features_ND in features], grids)
        else:
            self.writer.add(first, ids, outputs.cpu())

    def finish(
        self,
        trainer: Trainer,
        encoder: Encoder,
        parameters: Mapping[str, Any],
        version: Mapping[str, Any],
    ) -> None:
        """Write the manifest; called after predict, on every rank.

        Not a hook of the predict loop, as Lightning skips hooks on a rank without batches.
        """
        shards = self.writer.shards
        if trainer.world_size > 1:
            gathered: list[list[dict[str, Any]]] = [[]] * trainer.world_size
            dist.all_gather_object(gathered, shards)
            shards = [shard for rank_shards in gathered for shard in rank_shards]
        if trainer.is_global_zero:
            write_manifest(
                self.folder,
                encoder=encoder.name,
                layer=encoder.layer,
                grid=None if encoder.is_ragged else encoder.grid,
                width=encoder.width,
                fingerprint=fingerprint(encoder.tower),
                preprocess=describe_preprocessing(encoder.image_processor),
                parameters=parameters,
                shards=shards,
                resolved={**resolved(trainer.precision, trainer.strategy.root_device), **version},
            )
        trainer.strategy.barrier("manifest written")


def fill_store(
    encoder: Encoder,
    data: ImageDataModule,
    folder: Path,
    parameters: Mapping[str, Any],
    trainer_kwargs: Mapping[str, Any],
    version: Mapping[str, Any],
) -> None:
    """Encode all images of `data` into the store `folder`; its manifest is written last.

    `version` is the encoder's `atr.core.hub.checkpoint_version`, with bounds of an image's area if any.
    """
    batches = data.batches
    writer = StoreWriter(folder, len(batches.images), batches.shard_images, encoder.is_ragged)
    trainer = Trainer(
        **trainer_kwargs,
        callbacks=[writer],
        logger=False,
        use_distributed_sampler=False,  # the data module distributes shards, not images
    )
    trainer.predict(FeatureExtraction(encoder), datamodule=data, return_predictions=False)
    writer.finish(trainer, encoder, parameters, version)
