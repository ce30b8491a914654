"""Training on images of nine tokens: six copies of a background, and ink on the other three."""

from dataclasses import replace
from itertools import pairwise, product
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from torch.utils.data import DataLoader
from torchmetrics import Metric

from atr.config import Pretrain
from atr.core.tokens import mask_of, random_mask_BN, top_k_BK
from atr.reduction.autoencoder import FeatureAutoencoder
from atr.reduction.pretraining import (
    AutoencoderTraining,
    CollapseGuard,
    DivergedError,
    ReconstructorTraining,
    new_autoencoder,
    step_noise,
    train_beside,
    warmup_cosine,
)

SHORT = Pretrain(epochs=1, batch_size=32, learning_rate=1e-2, initial_bias=1.0, keep=5 / 9)


def page(images, seed):
    """features_BND and the mask of ink tokens; each background and each ink token has its own angle."""
    generator = torch.Generator().manual_seed(seed)
    one, two = torch.tensor([1.0, -1, 1, -1]), torch.tensor([1.0, 1, -1, -1])
    basis = torch.stack([one.repeat(4), two.repeat(4)])
    signs = torch.ones(16).where(torch.arange(16) < 8, torch.tensor(-1.0))
    angle = 6.2832 * torch.rand(images, 4, generator=generator)
    colours = torch.stack([angle.cos(), angle.sin()], -1) / 2**0.5
    vectors = torch.cat([colours[:, :1] @ basis, colours[:, 1:] @ (basis * signs)], dim=1)
    places = torch.rand(images, 9, generator=generator).argsort(1)
    which = torch.tensor([0, 0, 0, 0, 0, 0, 1, 2, 3]).expand(images, 9).gather(1, places)
    return vectors.gather(1, which[..., None].expand(-1, -1, 16)), which > 0


class Pages(LightningDataModule):
    def __init__(self, features):
        super().__init__()
        self.features = features

    def train_dataloader(self):
        return DataLoader(self.features, batch_size=32)

    def val_dataloader(self):
        return DataLoader(self.features[:64], batch_size=32)


class Losses(Callback):
    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.values.append(outputs["loss"].item())


class Kept(Callback):
    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.values.append(outputs["kept"].item())


def train(pretrain, features, *callbacks, seed=0, kind=AutoencoderTraining):
    torch.manual_seed(0)
    autoencoder = FeatureAutoencoder(16, (3, 3), 1, 2, 2.0, "none", pretrain.initial_bias)
    module = kind(autoencoder, pretrain, seed)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=pretrain.epochs,
        callbacks=list(callbacks),
        num_sanity_val_steps=0,
        enable_model_summary=False,
        **quiet,
    )
    trainer.fit(module, datamodule=Pages(features))
    return module


@pytest.fixture(scope="module")
def trained():
    return train(SHORT, page(300 * 32, seed=0)[0], CollapseGuard(SHORT))


@pytest.mark.parametrize("seed", range(3))
def test_kept_fraction_falls_to_p_and_stays_under_any_noise(seed):
    kept = Kept()
    train(SHORT, page(300 * 32, seed=0)[0], kept, seed=seed)
    assert sum(kept.values[:5]) / 5 > 0.65
    late = [sum(kept.values[start : start + 50]) / 50 for start in range(150, 300, 50)]
    # An image's sample of nine tokens strays by one or so from its mean, and is pulled back only above p: the
    # mean of 50 steps settles 0.8 to 1.1 tokens below it, in six streams of noise.
    assert all(SHORT.keep - 1.5 / 9 <= mean <= SHORT.keep + 0.02 for mean in late)
    assert max(late) - min(late) < 0.05


def of_rank(kind, rank):
    """A training with the given rank."""
    return type(kind.__name__, (kind,), {"global_rank": property(lambda self: rank)})


@pytest.mark.parametrize("kind", [AutoencoderTraining, ReconstructorTraining])
def test_every_rank_draws_its_own_noise(kind):
    """With the same noise two ranks would draw the same masks, which no other test would notice."""
    losses = Losses(), Losses(), Losses()
    for rank, seen in zip((0, 1, 0), losses, strict=True):
        train(SHORT, page(4 * 32, seed=0)[0], seen, kind=of_rank(kind, rank))
    first, second, again = (seen.values for seen in losses)
    assert first == again and first != second


def test_noise_depends_on_seed_step_and_rank():
    def drawn(seed, step, rank):
        module = SimpleNamespace(global_step=step, global_rank=rank, device=torch.device("cpu"))
        return torch.rand(4, generator=step_noise(module, seed)).tolist()

    places = list(product((0, 1, 11), repeat=3))
    noise = [drawn(*place) for place in places]
    assert noise == [drawn(*place) for place in places]
    assert len({*map(tuple, noise)}) == len(places)


def test_copies_are_dropped_first(trained):
    features, ink = page(200, seed=1)
    with torch.no_grad():
        keep = top_k_BK(trained.autoencoder.selector(features), 4)
    mask = mask_of(keep, 9)
    assert mask[ink].mean() > 0.97  # a random choice keeps 0.44
    assert mask[~ink].sum() > 0  # and one of the copies


def test_history_has_every_metric_of_the_epoch(trained):
    (epoch,) = trained.history
    assert epoch["epoch"] == 0 and epoch["step"] == 300
    for split in ("train", "validation"):
        loss = epoch[f"{split}/loss_reconstruction"] + epoch[f"{split}/loss_kept"]
        assert epoch[f"{split}/loss"] == pytest.approx(loss, rel=1e-4)
        assert 0 <= epoch[f"{split}/kept"] <= 1
    assert epoch["validation/loss_reconstruction_top_0.5"] < epoch["validation/loss_reconstruction_top_0.1"]
    assert 0.2 < epoch["validation/explained_variance"] <= 1


def test_explained_variance_is_that_of_the_validation_set_under_the_hard_mask(trained):
    features = page(300 * 32, seed=0)[0][:64]
    with torch.no_grad():
        restored = trained.autoencoder.restore(features, (trained.autoencoder.selector(features) > 0).float())
    error, target = (restored - features).flatten(0, 1), features.flatten(0, 1)
    expected = (1 - error.var(0) / target.var(0)).mean()
    assert trained.history[0]["validation/explained_variance"] == pytest.approx(expected.item(), abs=1e-3)


def test_same_seed_gives_the_same_history():
    features = page(4 * 32, seed=0)[0]
    pretrain = replace(SHORT, epochs=2)
    assert train(pretrain, features).history == train(pretrain, features).history


def test_history_has_the_means_of_all_steps_of_each_epoch():
    losses, kept = Losses(), Kept()
    module = train(replace(SHORT, epochs=2), page(13 * 32, seed=0)[0], losses, kept)
    for number, epoch in enumerate(module.history):
        steps = slice(13 * number, 13 * (number + 1))
        assert epoch["train/loss"] == pytest.approx(sum(losses.values[steps]) / 13, rel=1e-5)
        assert epoch["train/kept"] == pytest.approx(sum(kept.values[steps]) / 13, rel=1e-5)
    # The history has the rate of an epoch's last step, not of the last that is a multiple of ten.
    rates = [SHORT.learning_rate * warmup_cosine(step, 26, SHORT.warmup) for step in (12, 25)]
    assert [epoch["train/learning_rate"] for epoch in module.history] == pytest.approx(rates)


class Written(DummyLogger):
    def __init__(self):
        super().__init__()
        self.steps = {}

    def log_metrics(self, metrics, step=None):
        self.steps |= {(name, step): value for name, value in metrics.items()}


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (AutoencoderTraining, "train/loss_step"),
        (ReconstructorTraining, "random_masks/train/loss_reconstruction"),
    ],
)
def test_the_logger_gets_the_loss_of_every_tenth_step(kind, name):
    written, losses = Written(), Losses()
    autoencoder = FeatureAutoencoder(16, (3, 3), 1, 2, 2.0, "none")
    module = kind(autoencoder, replace(SHORT, collapse_after=1.0), 0)
    step = kind.training_step

    def watched(features, batch_idx):
        outputs = step(module, features, batch_idx)
        losses.values.append(outputs["loss"] if isinstance(outputs, dict) else outputs)
        return outputs

    module.training_step = watched
    train_beside(module, Pages(page(23 * 32, seed=0)[0]), 1, written, **QUIET)
    steps = {step: value for (metric, step), value in written.steps.items() if metric == name}
    assert steps == {step: losses.values[step].item() for step in (9, 19)}


def test_loss_that_is_not_finite_stops_the_run():
    features = page(3 * 32, seed=0)[0]
    features[40] = float("nan")
    with pytest.raises(DivergedError, match=r"loss is nan at step 2: lower pretrain.learning_rate \(0.01\)"):
        train(SHORT, features, CollapseGuard(SHORT))


def test_selector_that_keeps_everything_stops_the_run():
    stuck = replace(SHORT, learning_rate=1e-6, initial_bias=8.0)
    with pytest.raises(
        DivergedError, match=r"kept fraction is (1.000|0.99.) after 11 steps, outside \[0.278"
    ):
        train(stuck, page(20 * 32, seed=0)[0], CollapseGuard(stuck))


@pytest.mark.parametrize(
    ("kept", "advice"),
    [(0.14, "raise pretrain.keep"), (0.16, None), (0.3, None), (0.49, None), (0.51, "normalise")],
)
def test_guard_checks_the_range_after_the_given_fraction_of_steps(kept, advice):
    guard = CollapseGuard(Pretrain(keep=0.3, collapse_after=0.5))  # [0.15, 0.5]
    outputs = {"loss": torch.tensor(1.0), "kept": torch.tensor(kept)}
    early, late = (SimpleNamespace(global_step=step, estimated_stepping_batches=100) for step in (50, 51))
    guard.on_train_batch_end(early, None, outputs, None, 0)
    if advice is None:
        guard.on_train_batch_end(late, None, outputs, None, 0)
        return
    with pytest.raises(DivergedError, match=advice):
        guard.on_train_batch_end(late, None, outputs, None, 0)


def test_guard_resumes_from_its_state():
    guard, resumed = CollapseGuard(SHORT), CollapseGuard(SHORT)
    guard.kept = 0.4
    resumed.load_state_dict(guard.state_dict())
    assert resumed.kept == 0.4


def test_guard_weighs_each_step_by_a_twentieth():
    guard = CollapseGuard(Pretrain(collapse_after=1.0))
    trainer = SimpleNamespace(global_step=1, estimated_stepping_batches=100)
    for kept in (0.9, 0.9, 0.1, 0.5):
        outputs = {"loss": torch.tensor(1.0), "kept": torch.tensor(kept)}
        guard.on_train_batch_end(trainer, None, outputs, None, 0)
    assert guard.kept == pytest.approx(0.9025 * 0.9 + 0.0475 * 0.1 + 0.05 * 0.5)


def test_learning_rate_rises_then_falls_to_zero():
    factors = [warmup_cosine(step, 100, 0.1) for step in range(101)]
    assert factors[:10] == pytest.approx([0.1 * step for step in range(1, 11)])
    assert factors[10] == 1 and factors[55] == pytest.approx(0.5) and factors[100] == pytest.approx(0)
    assert all(later <= earlier for earlier, later in pairwise(factors[10:]))
    assert warmup_cosine(0, 100, 0.0) == 1


def test_new_autoencoder_records_its_encoder():
    images = list(torch.randn(10, 6, 16))
    autoencoder = new_autoencoder(Pretrain(heads=2, keep=0.4), 16, (2, 3), "tiny", -2, images)
    selector = autoencoder.selector
    assert (selector.encoder, selector.layer, selector.keep, selector.grid) == ("tiny", -2, 0.4, (2, 3))
    torch.testing.assert_close(selector.standardise.mean_D, torch.stack(images).mean((0, 1)))
    with pytest.raises(ValueError, match="heads: 3"):
        new_autoencoder(Pretrain(heads=3), 16, (2, 3), "tiny", -2, images)


QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}


def restorer(features, epochs):
    torch.manual_seed(0)
    autoencoder = FeatureAutoencoder(16, (3, 3), 1, 2, 2.0, "none")
    module = ReconstructorTraining(autoencoder, SHORT, seed=0)
    return train_beside(module, Pages(features), epochs, None, **QUIET).autoencoder


def test_reconstructor_of_random_masks_restores_copies_and_does_not_change_the_selector():
    net, untrained = (
        restorer(page(200 * 32, seed=0)[0], epochs=1),
        FeatureAutoencoder(16, (3, 3), 1, 2, 2.0, "none"),
    )
    features, ink = page(400, seed=1)
    mask = random_mask_BN(400, 9, torch.Generator().manual_seed(1))
    copied = ~ink & (mask == 0) & ((mask.bool() & ~ink).any(1, keepdim=True))
    with torch.no_grad():
        error = (net.restore(features, mask) - features).square().mean(-1)
        before = (untrained.restore(features, mask) - features).square().mean(-1)
    # Of a lost background there are copies, of lost ink there is none: its mean is the best guess.
    assert error[copied].mean() < 0.3 * before[copied].mean()
    assert error[ink & (mask == 0)].mean() > 0.7 * before[ink & (mask == 0)].mean()
    torch.manual_seed(0)
    fresh = FeatureAutoencoder(16, (3, 3), 1, 2, 2.0, "none").selector.state_dict()
    assert all(torch.equal(fresh[name], weight) for name, weight in net.selector.state_dict().items())


def test_train_beside_is_reproducible_and_writes_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    features = page(4 * 32, seed=0)[0]
    first, again = (restorer(features, epochs=2).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    longer = restorer(features, epochs=3).state_dict()
    assert not torch.equal(longer["masked_D"], first["masked_D"])
    assert list(tmp_path.iterdir()) == []


def test_train_beside_gives_the_same_selector_as_training_alone():
    features = page(8 * 32, seed=0)[0]
    torch.manual_seed(0)
    autoencoder = FeatureAutoencoder(16, (3, 3), 1, 2, 2.0, "none", SHORT.initial_bias)
    beside = train_beside(
        AutoencoderTraining(autoencoder, SHORT, 0), Pages(features), SHORT.epochs, None, **QUIET
    )
    alone = train(SHORT, features).autoencoder.state_dict()
    assert all(torch.equal(alone[name], weight) for name, weight in beside.autoencoder.state_dict().items())


def test_train_beside_guards_a_selector():
    features = page(3 * 32, seed=0)[0]
    features[40] = float("nan")
    module = AutoencoderTraining(FeatureAutoencoder(16, (3, 3), 1, 2, 2.0, "none"), SHORT, 0)
    with pytest.raises(DivergedError, match="loss is nan"):
        train_beside(module, Pages(features), 1, None, **QUIET)


@pytest.mark.parametrize("kind", [AutoencoderTraining, ReconstructorTraining])
def test_logged_values_are_reduced_over_ranks(monkeypatch, kind):
    of_all, log = {}, kind.log

    def watched(self, name, value, **options):
        of_all[name] = bool(options.get("sync_dist")) or isinstance(value, Metric)
        log(self, name, value, **options)

    monkeypatch.setattr(kind, "log", watched)
    train(SHORT, page(2 * 32, seed=0)[0], kind=kind)
    assert sum(of_all.values()) >= 2
    assert {name for name, is_of_all in of_all.items() if not is_of_all} <= {"train/learning_rate"}
