"""Training of selector and reconstructor by Eq. 7 of the paper, with a guard against collapse."""

import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from PIL import Image
from torch import Tensor
from torchmetrics import ExplainedVariance

from atr.core.ragged import Grid, RaggedFeatures, RaggedGrids, of_each_image
from atr.core.tokens import budget, mask_of, random_mask_BN, top_k_BK
from atr.core.tower_layer import TowerLayer
from atr.reduction import losses
from atr.reduction.autoencoder import FeatureAutoencoder
from atr.reduction.checkpoints import Checkpoints, WholeCheckpoints
from atr.reduction.mask_pictures import mask_picture
from atr.reduction.selector import FeatureSelector

if TYPE_CHECKING:
    from atr.config.distill import Distill
    from atr.config.pretrain import Pretrain

VALIDATION_KEEP = (0.1, 0.3, 0.5)
"""Kept fractions at which validation restores from the top K tokens, as selected at inference."""

FeatureBatch = Tensor | RaggedFeatures
"""features_BND of images of one grid, or features of images with grids of their own."""
Trained = TypeVar("Trained", "AutoencoderTraining", "ReconstructorTraining")


class DivergedError(ValueError):
    """Training diverged."""


class RecordedTraining(LightningModule):
    """A training with a `history` of the metrics of each finished epoch, which survives interruptions."""

    def __init__(self) -> None:
        super().__init__()
        self.history: list[dict[str, float]] = []

    def on_train_epoch_end(self) -> None:
        """Append the epoch's training and validation metrics to the history."""
        metrics = self.trainer.callback_metrics
        epoch = {name: value.item() for name, value in metrics.items() if not name.endswith("_step")}
        self.history.append({"epoch": self.current_epoch, "step": self.global_step, **epoch})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the history with the weights."""
        checkpoint["history"] = self.history

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the history of the epochs before the interruption."""
        self.history = checkpoint["history"]


class AutoencoderTraining(RecordedTraining):
    """Trains selector and reconstructor: minimises L_rec + max(L_pr, p), Eq. 7, over batches of features."""

    def __init__(self, autoencoder: FeatureAutoencoder, pretrain: "Pretrain", seed: int) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.pretrain = pretrain
        self.seed = seed
        self.explained_variance = ExplainedVariance()
        self._steps: list[dict[str, Tensor]] = []

    def training_step(self, batch: FeatureBatch, batch_idx: int) -> dict[str, Tensor]:
        """Loss and kept fraction of one batch with a sampled mask."""
        features_BND, grids = _sequences(batch)
        noise = step_noise(self, self.seed)
        restored_BND, mask_BN = self.autoencoder(features_BND, self.pretrain.temperature, noise, grids)
        terms = self._terms(restored_BND, features_BND, mask_BN, grids)
        self._steps.append({name: value.detach() for name, value in terms.items()})
        if is_logged_step(self.trainer):
            self.log_dict({f"train/{name}_step": value for name, value in terms.items()}, sync_dist=True)
            self.log("train/learning_rate", self.trainer.optimizers[0].param_groups[0]["lr"])
        return terms

    def on_train_epoch_end(self) -> None:
        """Log the means of the epoch's steps, and append all metrics to the history.

        Keeping the means costs Lightning 0.7 ms a step for each of them, in all 2 % of a step of micro.
        """
        for name in self._steps[0]:
            mean = torch.stack([step[name] for step in self._steps]).mean()
            self.log(f"train/{name}", mean, sync_dist=True)
        self._steps = []
        super().on_train_epoch_end()

    def validation_step(self, batch: FeatureBatch, batch_idx: int) -> None:
        """Loss and kept fraction with the hard mask, and reconstruction from the top K at VALIDATION_KEEP."""
        features_BND, grids = _sequences(batch)
        logits_BN = self.autoencoder.selector(features_BND, grids)
        mask_BN = (logits_BN > 0).float()
        restored_BND = self.autoencoder.restore(features_BND, mask_BN, grids)
        terms = self._terms(restored_BND, features_BND, mask_BN, grids)
        terms |= self._top_k(logits_BN, features_BND, grids)
        named = {f"validation/{name}": value for name, value in terms.items()}
        self.log_dict(named, sync_dist=True, batch_size=len(batch))
        self._explain(restored_BND, features_BND)

    def _top_k(self, logits_BN: Tensor, features_BND: Tensor, grids: RaggedGrids | None) -> dict[str, Tensor]:
        terms = {}
        for keep in VALIDATION_KEEP:
            mask_BN = top_fraction_mask(logits_BN, keep, grids)
            restored_BND = self.autoencoder.restore(features_BND, mask_BN, grids)
            terms[f"loss_reconstruction_top_{keep}"] = self._distance(restored_BND, features_BND, grids)
        return terms

    def _terms(
        self, restored_BND: Tensor, features_BND: Tensor, mask_BN: Tensor, grids: RaggedGrids | None
    ) -> dict[str, Tensor]:
        """Eq. 7 term by term."""
        reconstruction = self._distance(restored_BND, features_BND, grids)
        kept_B = losses.kept_fraction(mask_BN, grids)
        proportion = losses.at_least(kept_B, self.pretrain.keep)
        return {
            "loss": reconstruction + proportion,
            "loss_reconstruction": reconstruction,
            "loss_kept": proportion,
            "kept": kept_B.mean(),
        }

    def _distance(self, restored_BND: Tensor, features_BND: Tensor, grids: RaggedGrids | None) -> Tensor:
        variance = self.autoencoder.selector.standardise.variance
        return losses.reconstruction_loss(
            self.pretrain.normalise, restored_BND, features_BND, variance, grids
        )

    def _explain(self, restored_BND: Tensor, features_BND: Tensor) -> None:
        """Update the explained variance, averaged over channels; standardised, as its sums are float32."""
        standardise = self.autoencoder.selector.standardise
        self.explained_variance.update(
            standardise(restored_BND).flatten(0, 1), standardise(features_BND).flatten(0, 1)
        )
        self.log("validation/explained_variance", self.explained_variance)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with linear warm-up and cosine decay to zero."""
        return optimizers(self, self.pretrain)


class ReconstructorTraining(LightningModule):
    """Trains a reconstructor without a selector: minimises L_rec from randomly kept tokens."""

    def __init__(self, autoencoder: FeatureAutoencoder, pretrain: "Pretrain", seed: int) -> None:
        super().__init__()
        # With several processes every parameter that requires a gradient must get one.
        autoencoder.selector.requires_grad_(False)
        self.autoencoder = autoencoder
        self.pretrain = pretrain
        self.seed = seed

    def training_step(self, batch: FeatureBatch, batch_idx: int) -> Tensor:
        """Loss of one batch with random masks."""
        loss = self._loss(batch)
        if is_logged_step(self.trainer):
            self.log("random_masks/train/loss_reconstruction", loss, sync_dist=True)
        return loss

    def validation_step(self, batch: FeatureBatch, batch_idx: int) -> None:
        """Loss of a batch of held-out images."""
        name, loss = "random_masks/validation/loss_reconstruction", self._loss(batch)
        self.log(name, loss, sync_dist=True, batch_size=len(batch))

    def _loss(self, batch: FeatureBatch) -> Tensor:
        features_BND, grids = _sequences(batch)
        noise, parts = step_noise(self, self.seed), of_each_image(features_BND, grids)
        masks = [random_mask_BN(part.shape[0], part.shape[1], noise) for part in parts]
        mask_BN = torch.cat(masks, dim=1)
        restored_BND = self.autoencoder.restore(features_BND, mask_BN, grids)
        variance = self.autoencoder.selector.standardise.variance
        return losses.reconstruction_loss(
            self.pretrain.normalise, restored_BND, features_BND, variance, grids
        )

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with linear warm-up and cosine decay to zero."""
        return optimizers(self, self.pretrain)


def _sequences(batch: FeatureBatch) -> tuple[Tensor, RaggedGrids | None]:
    """features_BND, or the (1, T, D) of a ragged batch with the grids of its images."""
    return (batch, None) if isinstance(batch, Tensor) else (batch.features_1TD, batch.grids)


def top_fraction_mask(logits_BN: Tensor, keep: float, grids: RaggedGrids | None = None) -> Tensor:
    """Mask of each image's highest logits, the fraction `keep` of its own tokens; as `logits_BN`."""
    masks = []
    for part_BN in of_each_image(logits_BN, grids):
        tokens = part_BN.shape[1]
        masks.append(mask_of(top_k_BK(part_BN, budget(keep, tokens)), tokens))
    return torch.cat(masks, dim=1)


def is_logged_step(trainer: Trainer) -> bool:
    """Whether Lightning logs the values of this step, or it is an epoch's last, which the history shows."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by one of its connectors
    return (trainer.global_step + 1) % every == 0 or trainer.is_last_batch


def step_noise(module: LightningModule, seed: int) -> torch.Generator:
    """Generator seeded by seed, step and rank, so that a resumed run draws the same noise."""
    place = f"{seed} {module.global_step} {module.global_rank}"
    return torch.Generator(module.device).manual_seed(zlib.crc32(place.encode()))


def optimizers(module: LightningModule, recipe: "Pretrain | Distill") -> OptimizerLRScheduler:
    """AdamW with linear warm-up and cosine decay to zero at the estimated last step."""
    optimizer = torch.optim.AdamW(
        module.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
    )
    steps = int(module.trainer.estimated_stepping_batches)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: warmup_cosine(step, steps, recipe.warmup)
    )
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def warmup_cosine(step: int, steps: int, warmup: float) -> float:
    """Factor of the peak learning rate at `step` of `steps`; it rises over the first `warmup` of them."""
    rising = round(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


class CollapseGuard(Callback):
    """Stops a failed run with a DivergedError that names the parameter to change.

    A loss that is not finite stops it at once. After the fraction `collapse_after` of the steps (never if it
    is 1), a kept fraction outside [p/2, 1.5p + 0.05] stops it, as a running mean over about 20 steps.
    """

    MEMORY = 0.95

    def __init__(self, pretrain: "Pretrain") -> None:
        self.pretrain = pretrain
        self.kept: float | None = None

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Check the loss and the kept fraction of the last step."""
        if not bool(outputs["loss"].isfinite()):
            raise DivergedError(
                f"the loss is {outputs['loss'].item()} at step {trainer.global_step}: lower "
                f"pretrain.learning_rate ({self.pretrain.learning_rate}) or set trainer.precision: 32-true"
            )
        kept = outputs["kept"].item()
        self.kept = kept if self.kept is None else self.MEMORY * self.kept + (1 - self.MEMORY) * kept
        if trainer.global_step > self.pretrain.collapse_after * trainer.estimated_stepping_batches:
            self._check(self.kept, trainer.global_step)

    def _check(self, kept: float, step: int) -> None:
        p = self.pretrain.keep
        low, high = p / 2, 1.5 * p + 0.05
        if low <= kept <= high:
            return
        advice = (
            "the selector drops nearly everything: lower pretrain.learning_rate or raise pretrain.keep"
            if kept < low
            else "the selector has not learned to drop: raise pretrain.epochs or pretrain.learning_rate, "
            "lower pretrain.initial_bias, or set pretrain.normalise to variance"
        )
        raise DivergedError(
            f"the kept fraction is {kept:.3f} after {step} steps, outside [{low:.3f}, {high:.3f}] for "
            f"pretrain.keep {p}: {advice}"
        )

    def state_dict(self) -> dict[str, Any]:
        """The running mean, so that a resumed run stops where an uninterrupted one would."""
        return {"kept": self.kept}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the running mean."""
        self.kept = state_dict["kept"]


class MaskPictures(Callback):
    """Draws the hard masks of a few validation images after each epoch; `publish` gets the PNG's path."""

    def __init__(
        self,
        pictured: Sequence[tuple[Tensor, Grid, Image.Image]],
        folder: Path,
        publish: Callable[[Path], None],
    ) -> None:
        """`pictured` are images, each with its features_ND and grid."""
        self.pictured = pictured
        self.folder = folder
        self.publish = publish

    @torch.no_grad()
    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Draw and publish on rank 0."""
        if not trainer.is_global_zero:
            return
        assert isinstance(module, AutoencoderTraining)
        masked = [
            (image, self._mask_RC(module.autoencoder.selector, features_ND, grid))
            for features_ND, grid, image in self.pictured
        ]
        path = self.folder / f"epoch-{trainer.current_epoch:03d}.png"
        mask_picture(masked).save(path)
        self.publish(path)

    def _mask_RC(self, selector: FeatureSelector, features_ND: Tensor, grid: Grid) -> Tensor:
        features_BND = features_ND.unsqueeze(0).to(selector.standardise.mean_D)
        logits_BN: Tensor = selector(features_BND, grid)
        return (logits_BN > 0).reshape(grid).cpu()


def new_autoencoder(
    pretrain: "Pretrain",
    width: int,
    grid: tuple[int, int],
    encoder: str,
    layer: TowerLayer,
    images: Iterable[Tensor],
) -> FeatureAutoencoder:
    """An untrained autoencoder for an encoder's features, standardised by `images`, their features_ND.

    Raises ValueError for heads that do not divide the width.
    """
    autoencoder = FeatureAutoencoder(
        width=width,
        grid=grid,
        layers=pretrain.layers,
        heads=pretrain.heads,
        ffn_ratio=pretrain.ffn_ratio,
        position=pretrain.position,
        initial_bias=pretrain.initial_bias,
        encoder=encoder,
        layer=layer,
        keep=pretrain.keep,
    )
    autoencoder.selector.standardise.measure(images)
    return autoencoder


def train_autoencoder(
    module: AutoencoderTraining,
    data: LightningDataModule,
    checkpoints: Checkpoints,
    pictures: MaskPictures,
    logger: Logger,
    **trainer_kwargs: Any,
) -> bool:
    """Train with guard and pictures, resuming from the last of `checkpoints`; returns whether this is rank 0.

    Raises DivergedError, and on Ctrl-C SystemExit, as Lightning does.
    """
    callbacks = [CollapseGuard(module.pretrain), pictures]
    kwargs = trainer_kwargs | {"deterministic": True}
    return fit(module, data, module.pretrain.epochs, checkpoints, callbacks, logger, **kwargs)


def fit(
    module: LightningModule,
    data: LightningDataModule,
    epochs: int,
    checkpoints: Checkpoints,
    callbacks: Sequence[Callback],
    logger: Logger,
    **trainer_kwargs: Any,
) -> bool:
    """Train, resuming from the last of `checkpoints`; returns whether this is rank 0.

    `data` distributes the images over the devices itself.
    """
    kwargs = trainer_kwargs | {"plugins": WholeCheckpoints()}
    trainer = _trainer(epochs, [*callbacks, checkpoints], logger, **kwargs)
    trainer.fit(module, datamodule=data, ckpt_path=checkpoints.last(trainer), weights_only=True)
    return trainer.is_global_zero


def train_beside(
    module: Trained,
    data: LightningDataModule,
    epochs: int,
    logger: Logger | None,
    **trainer_kwargs: Any,
) -> Trained:
    """Train a module for comparison, without pictures and checkpoints; returns it.

    Raises DivergedError as `train_autoencoder` does.
    """
    guarded = isinstance(module, AutoencoderTraining)
    callbacks: list[Callback] = [CollapseGuard(module.pretrain)] if guarded else []
    # "warn", since a trainer's mode stays set, and later computations may lack deterministic kernels.
    kwargs = trainer_kwargs | {"deterministic": "warn", "enable_checkpointing": False}
    trainer = _trainer(epochs, callbacks, logger, **kwargs)
    trainer.fit(module, datamodule=data)
    return module


def _trainer(epochs: int, callbacks: Sequence[Callback], logger: Logger | None, **kwargs: Any) -> Trainer:
    # Deterministic mode also fills new memory with NaN, which takes 5 % of the time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    return Trainer(
        **kwargs,
        max_epochs=epochs,
        callbacks=list(callbacks),
        logger=False if logger is None else logger,
        log_every_n_steps=10,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,  # the data module distributes the images itself
    )
