"""Checkpoints that an interrupted training resumes from, named by everything the training depends on."""

import io
import os
import sys
from pathlib import Path
from typing import Any, BinaryIO
from zipfile import ZipFile

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from atr.core.files import digest, whole_file

BEFORE, BROKEN = ".before", ".broken"
"""What is appended to the name of the last checkpoint but one, and of one that could not be read."""


class Checkpoints(Checkpoint):
    """Writes a checkpoint after each epoch, and finds the one to go on from.

    The file name is a hash of what the training depends on, its number of processes and its arithmetic: any
    other training finds none, and removes these when it finishes. A finished training keeps its own: results
    that are lost afterwards are then made without training again.
    """

    def __init__(self, folder: Path, **depends_on: Any) -> None:
        self.folder, self._depends_on = folder, depends_on

    def path(self, trainer: Trainer) -> Path:
        """The file that a trainer's epochs are written to."""
        computes = {"accelerator": type(trainer.accelerator).__name__, "precision": str(trainer.precision)}
        name = digest(**self._depends_on, **computes, processes=trainer.world_size)
        return self.folder / f"{name}.ckpt"

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Write the epoch's checkpoint; of all callbacks Lightning calls those of this class last."""
        trainer.save_checkpoint(self.path(trainer))

    def last(self, trainer: Trainer) -> Path | None:
        """The checkpoint to go on from, None to begin.

        One that cannot be read is renamed and told on stderr. All ranks find the same one: none has written
        another yet, and to those that come late a renamed one is no whole one either.
        """
        last = self.path(trainer)
        for path, next_one in ((last, "the one before it, if there is one"), (_before(last), "the start")):
            if _is_whole(path):
                return path
            if trainer.is_global_zero and path.exists():
                aside = path.replace(path.with_name(path.name + BROKEN))
                told = f"{path} cannot be read: set aside as {aside.name}, training goes on from {next_one}"
                print(told, file=sys.stderr)
        return None

    def on_fit_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Remove those of other trainings, and what could not be read."""
        own = self.path(trainer)
        for path in self.folder.glob("*.ckpt*") if trainer.is_global_zero else ():
            if path.is_file() and path not in (own, _before(own)):  # what a kill leaves unwritten is a folder
                path.unlink()


class WholeCheckpoints(TorchCheckpointIO):
    """Checkpoints that appear whole or not at all, each beside the one before it.

    Lightning's own are written through a temporary folder, which may lie on another disk: copied from there,
    a full disk leaves half a file in the place of the former one.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Raises OSError naming `path`, where the former one stays, when it cannot be written."""
        content, path = io.BytesIO(), Path(path)
        torch.save(checkpoint, content)
        with whole_file(path) as temporary:
            temporary.write_bytes(content.getbuffer())
            if path.exists():
                os.replace(path, _before(path))


def _before(path: Path) -> Path:
    return path.with_name(path.name + BEFORE)


def _is_whole(path: Path) -> bool:
    """Whether there is a file, and it is what was written; raises OSError for one that may not be read."""
    try:
        with open(path, "rb") as file:
            return _loads(file)
    except FileNotFoundError:
        return False


def _loads(file: BinaryIO) -> bool:
    """Whether a checkpoint can be loaded; of garbage an unpickler may make any error."""
    try:
        if ZipFile(file).testzip():  # torch itself looks at no checksum
            return False
        file.seek(0)
        return "state_dict" in torch.load(file, map_location="cpu", weights_only=True)
    except Exception:
        return False
