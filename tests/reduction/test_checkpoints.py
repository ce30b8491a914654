"""Checkpoints of a training of one number: whole, broken, and of other trainings."""

import errno
import os

import lightning
import pytest
import torch
from torch.utils.data import DataLoader

from atr.reduction import checkpoints
from atr.reduction.checkpoints import Checkpoints, WholeCheckpoints
from atr.reduction.pretraining import DivergedError, RecordedTraining

QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "logger": False}


class Number(RecordedTraining):
    """Learns a number; `until` is the first epoch that is not finished."""

    def __init__(self, until=None):
        super().__init__()
        self.number, self.until, self.made = torch.nn.Parameter(torch.zeros(())), until, []

    def training_step(self, batch, index):
        if self.current_epoch == self.until:
            raise DivergedError
        self.log("loss", loss := (self.number - 1).square())
        return loss

    def on_train_epoch_start(self):
        self.made.append(self.current_epoch)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.1)


def trainer_of(kept, **changes):
    return lightning.Trainer(
        **QUIET | {"max_epochs": 4, "callbacks": [kept], "plugins": WholeCheckpoints(), **changes}
    )


def train(folder, until=None, **depends_on):
    """The module after its training, which stops with an error at epoch `until`."""
    module, kept = Number(until), Checkpoints(folder, **depends_on)
    trainer = trainer_of(kept)
    data = DataLoader(torch.zeros(3, 1))
    if until is None:
        trainer.fit(module, data, ckpt_path=kept.last(trainer), weights_only=True)
    else:
        with pytest.raises(DivergedError):
            trainer.fit(module, data, ckpt_path=kept.last(trainer), weights_only=True)
    return module


def names(folder):
    return sorted(path.name.partition(".")[2] for path in folder.iterdir())


@pytest.fixture
def unbroken(tmp_path_factory):
    return train(tmp_path_factory.mktemp("unbroken"))


BREAK = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "cut at the end": lambda content: content[:-1],
    "a byte of a weight": lambda content: (
        content[: (place := content.index(b"\0\0\0\0", 64))] + b"\1" + content[place + 1 :]
    ),
    "garbage": lambda content: os.urandom(len(content)),
    "text": lambda content: b"hello\n" * 99,
}


@pytest.mark.parametrize("kind", BREAK)
def test_a_broken_checkpoint_is_renamed_and_training_resumes_from_the_one_before(
    tmp_path, capsys, kind, unbroken
):
    train(tmp_path, until=3)
    assert names(tmp_path) == ["ckpt", "ckpt.before"]
    last = next(tmp_path.glob("*.ckpt"))
    last.write_bytes(BREAK[kind](last.read_bytes()))
    module = train(tmp_path, until=3)
    assert module.made == [2, 3], "the epoch of the broken one is made again"
    assert names(tmp_path) == ["ckpt", "ckpt.before", "ckpt.broken"]
    told = f"{last} cannot be read: renamed to {last.name}.broken, training resumes from the one before it"
    assert capsys.readouterr().err.count(told) == 1
    module = train(tmp_path)
    assert module.made == [3] and module.history == unbroken.history and module.number == unbroken.number
    assert names(tmp_path) == ["ckpt", "ckpt.before"]


def test_training_starts_anew_if_no_checkpoint_can_be_read(tmp_path, capsys, unbroken):
    train(tmp_path, until=2)
    for path in tmp_path.iterdir():
        path.write_bytes(b"")
    module = train(tmp_path)
    assert module.made == [0, 1, 2, 3] and module.history == unbroken.history
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2 and told[1].endswith("training resumes from the start")


def test_a_checkpoint_without_read_permission_is_not_renamed(tmp_path, monkeypatch):
    train(tmp_path, until=2)
    refused = PermissionError(errno.EACCES, "Permission denied")
    monkeypatch.setattr("builtins.open", lambda *_: (_ for _ in ()).throw(refused))
    kept = Checkpoints(tmp_path)
    with pytest.raises(PermissionError):
        kept.last(trainer_of(kept))
    assert names(tmp_path) == ["ckpt", "ckpt.before"]


def test_a_full_disk_leaves_the_former_checkpoint_whole(tmp_path, monkeypatch, unbroken):
    train(tmp_path, until=2)
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def half(path, content):
        with open(path, "wb") as file:
            file.write(bytes(content)[: len(content) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr("pathlib.Path.write_bytes", half)
        with pytest.raises(OSError, match=r"\.ckpt could not be written: No space left on device"):
            train(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == written
    module = train(tmp_path)
    assert module.made == [2, 3] and module.history == unbroken.history


def test_a_finished_training_is_not_repeated(tmp_path, unbroken):
    train(tmp_path)
    module = train(tmp_path)
    assert module.made == [] and module.history == unbroken.history and module.number == unbroken.number


def test_checkpoints_of_another_training_are_removed_only_when_this_one_finishes(tmp_path):
    train(tmp_path, until=2, seed=0)
    assert train(tmp_path, until=2, seed=1).made == [0, 1, 2]
    assert names(tmp_path) == ["ckpt", "ckpt", "ckpt.before", "ckpt.before"]
    assert train(tmp_path, seed=1).made == [2, 3]
    assert names(tmp_path) == ["ckpt", "ckpt.before"]
    assert train(tmp_path, seed=0).made == [0, 1, 2, 3]


def test_the_file_name_depends_on_the_precision(tmp_path):
    kept = Checkpoints(tmp_path, seed=0)
    ways = ({}, {"precision": "bf16-mixed"}, {"precision": "64-true"}, {"devices": 2, "strategy": "ddp"})
    assert len({kept.path(trainer_of(kept, **way)) for way in ways}) == len(ways)
    assert kept.path(trainer_of(kept, max_epochs=9)) == kept.path(trainer_of(kept))


def test_only_weights_are_read(tmp_path):
    """A checkpoint with other objects counts as broken; its code is not run."""
    train(tmp_path, until=1)
    last = next(tmp_path.glob("*.ckpt"))
    torch.save({"state_dict": {}, "call": checkpoints.Checkpoints}, last)
    assert train(tmp_path).made == [0, 1, 2, 3]


def test_a_folder_left_by_a_killed_write_does_not_fail_a_finished_training(tmp_path):
    litter = tmp_path / ".0123.ckpt.x.part"
    litter.mkdir()
    assert train(tmp_path).made == [0, 1, 2, 3]
    assert litter.is_dir()


def test_a_late_rank_does_not_find_a_broken_checkpoint(tmp_path, monkeypatch):
    """Rank 0 may rename a checkpoint while another rank is about to open it."""
    train(tmp_path, until=1)
    kept = Checkpoints(tmp_path)
    trainer = trainer_of(kept)
    last = kept.path(trainer)
    assert kept.last(trainer) == last
    monkeypatch.setattr("pathlib.Path.exists", lambda path: path == last)  # as it was a moment before
    last.rename(f"{last}.broken")
    monkeypatch.setattr("lightning.Trainer.is_global_zero", False)
    assert kept.last(trainer) is None
