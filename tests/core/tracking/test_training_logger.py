import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from mlflow import MlflowClient
from torch.utils.data import DataLoader

from atr import config
from atr.core import tracking
from atr.core.tracking import unlogged


class Tiny(LightningModule):
    """Logs a loss at each step; logging fails from the third step on."""

    def __init__(self, fail=lambda: None):
        super().__init__()
        self.save_hyperparameters(ignore="fail")
        self.layer, self.fail = torch.nn.Linear(1, 1), fail

    def training_step(self, batch, index):
        if index == 2:
            self.fail()
        loss = self.layer(batch).square().mean()
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def train(module, logger):
    trainer = Trainer(
        max_epochs=1,
        logger=logger,
        log_every_n_steps=1,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(torch.randn(6, 1)))
    return trainer


def steps(run):
    client = MlflowClient(tracking.store.tracking_uri())
    return [point.step for point in client.get_metric_history(run.info.run_id, "train/loss")]


def test_a_training_logs_each_step_and_leaves_the_end_of_the_run_to_the_stage(find):
    with tracking.run("pretrain", config.load("pretrain")) as run:
        logger = run.logger()
        train(Tiny(), logger)
        running = find("pretrain")
        assert running.info.status == "RUNNING"
        assert (logger.name, logger.version) == ("atr", running.info.run_id)
    assert steps(find("pretrain")) == [*range(6)]
    assert find("pretrain").data.metrics.keys() == {"epoch", "train/loss"}


def test_a_training_survives_a_failing_log(find, monkeypatch, capsys):
    calls = []

    def fail():
        monkeypatch.setattr(MlflowClient, "log_batch", lambda *_, **__: calls.append(1) or 1 / 0)

    with tracking.run("pretrain", config.load("pretrain")) as run:
        trainer = train(Tiny(fail), run.logger())
        assert trainer.global_step == 6
        assert len(calls) == 1, "a dead server is not asked at each step"
        monkeypatch.undo()
    assert "division by zero" in capsys.readouterr().err


@pytest.fixture(autouse=True)
def nothing_left():
    yield
    assert unlogged.pending_folders() == []
