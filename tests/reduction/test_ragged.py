"""Nets and trainings on images with grids of their own, against a loop over the images."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch import nn
from torch.utils.data import DataLoader

from atr.config import Pretrain
from atr.core.ragged import RaggedFeatures
from atr.core.tokens import budget, gumbel_mask_BN, random_mask_BN
from atr.reduction import FeatureSelector, losses
from atr.reduction.autoencoder import FeatureAutoencoder
from atr.reduction.pretraining import (
    VALIDATION_KEEP,
    AutoencoderTraining,
    ReconstructorTraining,
    top_fraction_mask,
    train_beside,
)

WIDTH, OWN = 8, (3, 4)
GRIDS = [(2, 3), (1, 1), (3, 4), (5, 2), (2, 3), (1, 9)]
PRETRAIN = Pretrain(epochs=1, batch_size=4, heads=2, layers=2, keep=0.4, collapse_after=1.0)


def features(grids=GRIDS):
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(rows * columns, WIDTH, generator=generator) + 1, (rows, columns))
        for rows, columns in grids
    ]


def net(position="sine", kind=FeatureAutoencoder):
    """A net all of whose parts take part: heads start at zero."""
    torch.manual_seed(1)
    made = kind(WIDTH, OWN, 2, 2, 2.0, position)
    for name, weight in made.named_parameters():
        if "head" in name or name == "masked_D":
            nn.init.normal_(weight, std=0.5)
    selector = made if kind is FeatureSelector else made.selector
    selector.standardise.measure(features_ND for features_ND, _ in features())
    return made


@pytest.mark.parametrize("position", ["sine", "none"])
def test_the_logits_of_a_ragged_batch_are_those_of_each_image(position):
    selector, batch = net(position, FeatureSelector), RaggedFeatures.of(features())
    logits = batch.grids.split(selector(batch.features_1TD, batch.grids))
    for logits_1N, (features_ND, grid) in zip(logits, features(), strict=True):
        torch.testing.assert_close(logits_1N, selector(features_ND[None], grid))


def test_no_image_sees_another():
    selector, batch = net(kind=FeatureSelector), RaggedFeatures.of(features())
    changed = features()
    changed[2] = (changed[2][0] + 3, changed[2][1])
    one, other = (
        batch.grids.split(selector(part.features_1TD, part.grids))
        for part in (batch, RaggedFeatures.of(changed))
    )
    same = [torch.equal(before, after) for before, after in zip(one, other, strict=True)]
    assert same == [True, True, False, True, True, True]


def test_positions_are_those_of_an_images_own_grid():
    """Equal tokens in two grids of as many cells differ by their places alone."""
    selector, tokens = net(kind=FeatureSelector), torch.randn(6, WIDTH)
    wide, tall = RaggedFeatures.of([(tokens, (2, 3))]), RaggedFeatures.of([(tokens, (3, 2))])
    logits = [selector(batch.features_1TD, batch.grids) for batch in (wide, tall)]
    assert (logits[0] - logits[1]).abs().max() > 0.05


@pytest.mark.parametrize("shape", [(1, 42, WIDTH), (2, 22, WIDTH)])
def test_features_that_do_not_fit_the_grids_are_refused(shape):
    grids = RaggedFeatures.of(features()).grids
    with pytest.raises(ValueError, match=r"tokens and channels do not fit, allowed: \(44, 8\)"):
        net(kind=FeatureSelector)(torch.zeros(shape), grids)


def test_standardisation_is_over_all_tokens_whatever_image_they_are_of():
    standardise = net(kind=FeatureSelector).standardise
    tokens = torch.cat([features_ND for features_ND, _ in features()])
    torch.testing.assert_close(standardise.mean_D, tokens.mean(0))
    torch.testing.assert_close(standardise.deviation_D, tokens.std(0, correction=0))


def training(kind, normalise="variance", position="sine"):
    """A training of a net at step 0, with a generator as its own steps draw from."""
    module = kind(net(position), replace(PRETRAIN, normalise=normalise), seed=5)
    module._trainer = SimpleNamespace(global_step=0, log_every_n_steps=50, is_last_batch=False, global_rank=0)
    return module


def gradients(module, loss):
    module.autoencoder.zero_grad()
    loss.backward()
    named = module.autoencoder.named_parameters()
    return {name: weight.grad.clone() for name, weight in named if weight.grad is not None}


@pytest.mark.parametrize("normalise", ["variance", "none"])
@pytest.mark.parametrize("position", ["sine", "none"])
def test_a_step_is_the_mean_over_the_images_of_an_unbatched_loop_and_so_are_its_gradients(
    monkeypatch, normalise, position
):
    module, batch = training(AutoencoderTraining, normalise, position), RaggedFeatures.of(features())
    monkeypatch.setattr("atr.reduction.pretraining.step_noise", lambda *_: torch.Generator().manual_seed(7))
    terms = module.training_step(batch, 0)
    found = gradients(module, terms["loss"])

    noise, autoencoder = torch.Generator().manual_seed(7), module.autoencoder
    variance, distances, kept = autoencoder.selector.standardise.variance, [], []
    for features_ND, grid in features():
        features_1ND = features_ND[None]
        mask_1N = gumbel_mask_BN(autoencoder.selector(features_1ND, grid), PRETRAIN.temperature, noise)
        restored_1ND = autoencoder.restore(features_1ND, mask_1N, grid)
        distances.append(losses.RECONSTRUCTION[normalise](restored_1ND, features_1ND, variance))
        kept.append(mask_1N.mean())
    reconstruction, kept = sum(distances) / len(GRIDS), torch.stack(kept)
    loss = reconstruction + kept.clamp_min(PRETRAIN.keep).mean()
    torch.testing.assert_close(terms["loss"], loss)
    torch.testing.assert_close(terms["loss_reconstruction"], reconstruction)
    torch.testing.assert_close(terms["kept"], kept.mean())
    assert len(set(kept.tolist())) > 2
    expected = gradients(module, loss)
    assert found.keys() == expected.keys() and len(found) > 20
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name, rtol=1e-4, atol=1e-6)


def test_random_masks_are_drawn_for_each_image_over_its_own_tokens(monkeypatch):
    module, batch = training(ReconstructorTraining), RaggedFeatures.of(features())
    monkeypatch.setattr("atr.reduction.pretraining.step_noise", lambda *_: torch.Generator().manual_seed(7))
    loss = module.training_step(batch, 0)
    noise, autoencoder, distances = torch.Generator().manual_seed(7), module.autoencoder, []
    for features_ND, grid in features():
        mask_1N = random_mask_BN(1, len(features_ND), noise)
        restored_1ND = autoencoder.restore(features_ND[None], mask_1N, grid)
        error = losses.unexplained_variance(
            restored_1ND, features_ND[None], autoencoder.selector.standardise.variance
        )
        distances.append(error)
    torch.testing.assert_close(loss, sum(distances) / len(distances))


@pytest.mark.parametrize("keep", [*VALIDATION_KEEP, 1.0])
def test_a_fraction_is_of_each_images_own_tokens(keep):
    batch = RaggedFeatures.of(features())
    logits_1T = torch.randn(1, sum(batch.grids.tokens))
    masks = batch.grids.split(top_fraction_mask(logits_1T, keep, batch.grids))
    for mask_1N, logits_1N in zip(masks, batch.grids.split(logits_1T), strict=True):
        count = budget(keep, mask_1N.shape[1])
        assert mask_1N.nonzero()[:, 1].tolist() == sorted(logits_1N[0].topk(count).indices.tolist())


class Batches(LightningDataModule):
    """The same images as one kind of batch or the other."""

    def __init__(self, features_IND, grid, is_ragged):
        super().__init__()
        self.features_IND, self.grid, self.is_ragged = features_IND, grid, is_ragged

    def train_dataloader(self):
        collate = self._ragged if self.is_ragged else torch.stack
        return DataLoader(list(self.features_IND), batch_size=4, collate_fn=collate)

    val_dataloader = train_dataloader

    def _ragged(self, images):
        return RaggedFeatures.of((features_ND, self.grid) for features_ND in images)


QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}


def test_images_of_one_grid_train_alike_in_both_kinds_of_batches():
    """Also of several epochs: the noise of a step has the same order, image by image."""
    features_IND = torch.randn(24, 12, WIDTH, generator=torch.Generator().manual_seed(3))
    histories = []
    for is_ragged in (False, True):
        module = AutoencoderTraining(net(), PRETRAIN, seed=0)
        train_beside(module, Batches(features_IND, OWN, is_ragged), 3, None, **QUIET)
        histories.append(module.history)
    for one, other in zip(*histories, strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    assert histories[0][0]["train/loss"] > histories[0][-1]["train/loss"]


def test_validation_means_are_over_images_not_batches_or_tokens():
    """A last batch of fewer images counts less."""
    module, given = AutoencoderTraining(net(), replace(PRETRAIN, learning_rate=1e-9), 0), features()

    class Uneven(Batches):
        def train_dataloader(self):
            batches = [RaggedFeatures.of(given[:5]), RaggedFeatures.of(given[5:])]
            return DataLoader(batches, batch_size=None)

        val_dataloader = train_dataloader

    train_beside(module, Uneven(None, None, True), 1, None, **QUIET)
    selector = module.autoencoder.selector
    with torch.no_grad():
        kept = [(selector(features_ND[None], grid) > 0).float().mean() for features_ND, grid in given]
    assert module.history[0]["validation/kept"] == pytest.approx(sum(kept).item() / len(kept), abs=1e-4)
    assert -1 < module.history[0]["validation/explained_variance"] <= 1
