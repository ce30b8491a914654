"""Checkpoints from which an interrupted training resumes, named by everything the training depends on."""

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
"""Suffixes of the last checkpoint but one, and of a checkpoint that cannot be read."""


class Checkpoints(Checkpoint):
    """Writes a checkpoint after each epoch, and finds the one to resume from.

    The file name is a hash of everything the training depends on, with its number of processes and its
    precision. A different training does not find these checkpoints, and removes them when it finishes. A
    finished training keeps its own, so that lost results are written again without training.
    """

    def __init__(self, folder: Path, **depends_on: Any) -> None:
        self.folder, self._depends_on = folder, depends_on

    def path(self, trainer: Trainer) -> Path:
        """The file to which a trainer's epochs are written."""
        computes = {"accelerator": type(trainer.accelerator).__name__, "precision": str(trainer.precision)}
        name = digest(**self._depends_on, **computes, processes=trainer.world_size)
        return self.folder / f"{name}.ckpt"

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Write the epoch's checkpoint; Lightning calls callbacks of this class after all others."""
        trainer.save_checkpoint(self.path(trainer))

    def last(self, trainer: Trainer) -> Path | None:
        """The checkpoint to resume from; None to start from scratch.

        A checkpoint that cannot be read is renamed and reported on stderr. All ranks find the same one: none
        has written a new one yet, and a late rank could not have read a renamed file either.
        """
        last = self.path(trainer)
        for path, fallback in ((last, "the one before it, if there is one"), (_before(last), "the start")):
            if _is_whole(path):
                return path
            if trainer.is_global_zero and path.exists():
                aside = path.replace(path.with_name(path.name + BROKEN))
                message = f"{path} cannot be read: renamed to {aside.name}, training resumes from {fallback}"
                print(message, file=sys.stderr)
        return None

    def on_fit_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Remove checkpoints of other trainings, and those that cannot be read."""
        own = self.path(trainer)
        for path in self.folder.glob("*.ckpt*") if trainer.is_global_zero else ():
            if path.is_file() and path not in (own, _before(own)):  # a killed write leaves a folder
                path.unlink()


class WholeCheckpoints(TorchCheckpointIO):
    """Atomic writes of checkpoints; the checkpoint before the last one is kept.

    Lightning writes to a temporary folder first, which may be on another disk. If the disk is full, copying
    from there would leave half a file in place of the former checkpoint.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write a checkpoint; raises OSError naming `path`, with the former file in place, if it cannot."""
        content, path = io.BytesIO(), Path(path)
        torch.save(checkpoint, content)
        with whole_file(path) as temporary:
            temporary.write_bytes(content.getbuffer())
            if path.exists():
                os.replace(path, _before(path))


def _before(path: Path) -> Path:
    return path.with_name(path.name + BEFORE)


def _is_whole(path: Path) -> bool:
    """Whether the file exists and is intact; raises OSError if it may not be read."""
    try:
        with open(path, "rb") as file:
            return _loads(file)
    except FileNotFoundError:
        return False


def _loads(file: BinaryIO) -> bool:
    """Whether a checkpoint can be loaded; an unpickler may raise any error on garbage."""
    try:
        if ZipFile(file).testzip():  # torch checks no checksums
            return False
        file.seek(0)
        return "state_dict" in torch.load(file, map_location="cpu", weights_only=True)
    except Exception:
        return False
