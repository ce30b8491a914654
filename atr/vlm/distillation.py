"""Distillation: a selector learns from the frozen language model which tokens its answers depend on.

The paper's autoencoder keeps the tokens that a reconstructor cannot restore. But features that a trained
reconstructor can recover may be invisible to a frozen language model. Here the language model itself is the
judge: a token is worth little if the answers do not change without it.

Shapes: B images, N tokens of a tile, P packed tokens of an image, L tokens of a sequence, A answer tokens of
a batch, V words of the vocabulary.
"""

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import lightning
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, DistributedSampler, Subset

from atr.core.tokens import budget, mask_of, perturb_BN, top_k_BK, top_k_mask_BN
from atr.core.tower_layer import TowerLayer
from atr.reduction import FeatureSelector, SelectorReducer
from atr.reduction.checkpoints import Checkpoints
from atr.reduction.pretraining import DivergedError, RecordedTraining, fit, optimizers, step_noise
from atr.vlm.generation import Generator
from atr.vlm.prefix import why_not_shared
from atr.vlm.prompted import Answers, PromptedBatch, PromptedImage, PromptReader
from atr.vlm.reduce import layer_of
from atr.vlm.teacher import PromptedImages, StoredAnswers, answer
from atr.vlm.tiling import ROW_END
from atr.vlm.weighted_attention import WeightedSequence, log_probabilities

if TYPE_CHECKING:
    from atr.config.distill import Distill

COMPARED_KEEP = (0.1, 0.3, 0.5)
"""Kept fractions at which validation compares the answers."""

_SUFFIX = ".answers"

TokenWeights = tuple[Tensor, Tensor]
"""The weights of an image's tokens, 1 kept and 0 dropped, and a mask of those that the model reads."""


def check_teacher(model: Any) -> None:
    """Raise ValueError for a model whose prompts cannot share the reading of an image.

    The weights of `model` are not read, so that it may be on the meta device.
    """
    if reason := why_not_shared(model):
        raise ValueError(
            f"distill: {model.config.model_type} cannot teach: {reason}; allowed: causal attention to all "
            "tokens before, as in llava, qwen2_5_vl, qwen3_vl, internvl and idefics3"
        )


class Distillation(RecordedTraining):
    """Trains a selector to minimise the divergence of the model's answers from those with all tokens.

    Dropped tokens are left out, or have next to no weight in attention; the kept ones have the positions of
    the generator's settings. The budget of each image is drawn at every step. The model is frozen and not
    part of the checkpoint.
    """

    def __init__(self, selector: FeatureSelector, generator: Generator, recipe: "Distill", seed: int) -> None:
        """Raise ValueError for a model whose cache several prompts cannot share."""
        super().__init__()
        check_teacher(generator.model)
        self.selector, self.generator, self.recipe, self.seed = selector, generator, recipe, seed
        self.reader = PromptReader(generator, layer_of(generator.model, SelectorReducer(selector)))
        self.answers: StoredAnswers | Mapping[str, Answers] = {}

    def on_fit_start(self) -> None:
        """Move the language model to the selector's device."""
        self.generator.model.to(self.device)

    def training_step(self, batch: Sequence[PromptedImage], batch_idx: int) -> Tensor:
        """The divergence under a sampled set of tokens of each image; raises DivergedError if not finite."""
        noise = step_noise(self, self.seed)
        divergence, _ = self._compare(batch, [partial(self._sample, noise=noise)])[0]
        if not bool(divergence.isfinite()):
            raise DivergedError(
                f"the divergence is {divergence.item()} at step {self.global_step}: lower "
                f"distill.learning_rate ({self.recipe.learning_rate}) or set trainer.precision: 32-true"
            )
        options: Any = {"on_epoch": True, "sync_dist": True, "batch_size": len(batch)}
        self.log("train/divergence", divergence, prog_bar=True, **options)
        self.log("train/learning_rate", self.trainer.optimizers[0].param_groups[0]["lr"])
        return divergence

    def validation_step(self, batch: Sequence[PromptedImage], batch_idx: int) -> None:
        """Log the divergence and the fraction of unchanged answer tokens with only the best tokens."""
        best = [partial(self._best, keep=keep) for keep in COMPARED_KEEP]
        for keep, (divergence, agreement) in zip(COMPARED_KEEP, self._compare(batch, best), strict=True):
            metrics = {f"validation/divergence_{keep}": divergence, f"validation/agreement_{keep}": agreement}
            self.log_dict(metrics, sync_dist=True, batch_size=len(batch))

    def _sample(self, scores_P: Tensor, noise: torch.Generator) -> TokenWeights:
        """A drawn number of the best tokens under noise; beside them the best of the others are read.

        Those farther below the lowest kept score would get next to no gradient.
        """
        low, high = (budget(keep, len(scores_P)) for keep in (self.recipe.lowest, self.recipe.highest))
        k_1 = torch.randint(low, high + 1, (1,), generator=noise, device=scores_P.device)
        noisy_P = perturb_BN(scores_P[None], self.recipe.temperature, noise)[0]
        read = min(int(k_1) + budget(self.recipe.candidates, len(scores_P)), len(scores_P))
        return top_k_mask_BN(noisy_P[None], k_1)[0], mask_of(top_k_BK(noisy_P, read), len(scores_P)).bool()

    def _best(self, scores_P: Tensor, keep: float) -> TokenWeights:
        """The best tokens alone, as in evaluation."""
        mask_P = mask_of(top_k_BK(scores_P, budget(keep, len(scores_P))), len(scores_P))
        return mask_P, mask_P.bool()

    def _compare(
        self, batch: Sequence[PromptedImage], selections: Sequence[Callable[[Tensor], TokenWeights]]
    ) -> list[tuple[Tensor, Tensor]]:
        """Divergence and agreement under each of `selections`, functions of an image's scores (P,)."""
        answers = [self.answers[name].to(self.device) for name, _ in batch]
        prompted = self.reader.read(batch)
        expected_AV = torch.cat([of_image.log_probabilities_AV for of_image in answers])
        scores = self._scores(prompted)
        compared = []
        for select in selections:
            sequences = self._sequences(prompted, answers, [select(scores_P) for scores_P in scores])
            actual_AV = log_probabilities(self.generator.model, sequences)
            divergence_A = functional.kl_div(actual_AV, expected_AV, reduction="none", log_target=True).sum(1)
            same_A = actual_AV.argmax(1) == expected_AV.argmax(1)
            counts = [len(of_image.log_probabilities_AV) for of_image in answers]
            compared.append((_mean_of_images(divergence_A, counts), same_A.float().mean()))
        return compared

    def _scores(self, prompted: PromptedBatch) -> list[Tensor]:
        """Scores of the visual tokens of each row's image, without newlines."""
        encoded, layout = prompted.prepared.encoded, prompted.prepared.layout
        packed = layout.values(
            encoded.map(lambda tiles: self.selector(tiles.features_BND.float(), tiles.grid)[..., None])
        )
        return [
            packed[image][(layout.tile_of[image] != ROW_END).to(packed[image].device), 0]
            for image in prompted.prepared.image_of
        ]

    def _sequences(
        self, prompted: PromptedBatch, answers: Sequence[Answers], selected: Sequence[TokenWeights]
    ) -> list[WeightedSequence]:
        """What the model reads of each image and its answered prompts; newlines are always kept."""
        sequences, positions = [], self.generator.settings.positions
        prepared = prompted.prepared
        for row, (weight_N, read_N) in enumerate(selected):
            visual_P = (prepared.layout.tile_of[prepared.image_of[row]] != ROW_END).to(weight_N.device)
            weight_P = torch.ones_like(visual_P, dtype=weight_N.dtype).masked_scatter(visual_P, weight_N)
            read_P = torch.ones_like(visual_P).masked_scatter(visual_P, read_N)
            sequences.append(prompted.sequence(row, answers[row], weight_P, read_P, positions))
        return sequences

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with linear warm-up and cosine decay to zero."""
        return optimizers(self, self.recipe)


class AskTeacher(Callback):
    """Before the first step has the teacher answer all prompts, and removes the answers after the last one.

    The images of a file are the same in every run, so that an interrupted training goes on with the same
    answers. Ranks answer a share each and read those of all.
    """

    def __init__(self, reader: PromptReader, images: PromptedImages, checkpoints: Checkpoints) -> None:
        self.reader, self.images, self.checkpoints = reader, images, checkpoints

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Write the answers that are missing, and hand all of them to the module.

        Raises SIGTERMException, as Lightning does between two steps.
        """
        folder = self.checkpoints.path(trainer).with_suffix(_SUFFIX)
        folder.mkdir(parents=True, exist_ok=True)
        stored = StoredAnswers(folder, self.images)
        for number in range(trainer.global_rank, stored.files, trainer.world_size):
            if trainer.received_sigterm:
                raise SIGTERMException
            if not stored.has(number):
                batch = [self.images[index] for index in stored.images_of(number)]
                with trainer.precision_plugin.forward_context():
                    stored.write(number, answer(self.reader, batch))
        trainer.strategy.barrier("answers")
        assert isinstance(module, Distillation)
        module.answers = stored

    def on_fit_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Remove the answers, and those of trainings that were given up."""
        for folder in self.checkpoints.folder.glob(f"*{_SUFFIX}") if trainer.is_global_zero else ():
            shutil.rmtree(folder)


def _mean_of_images(values_A: Tensor, counts: Sequence[int]) -> Tensor:
    """Mean over the answer tokens of each image, then over images, so that long answers weigh no more."""
    return torch.stack([values.mean() for values in torch.split(values_A, list(counts))]).mean()


def new_selector(
    recipe: "Distill",
    width: int,
    grid: tuple[int, int],
    encoder: str,
    layer: TowerLayer,
    images: Iterable[Tensor],
) -> FeatureSelector:
    """An untrained selector with logits of 0, standardised by the features_ND of `images`.

    Raises ValueError for heads that do not divide the width.
    """
    shape = recipe.layers, recipe.heads, recipe.ffn_ratio, recipe.position
    selector = FeatureSelector(width, grid, *shape, initial_bias=0.0, encoder=encoder, layer=layer)
    selector.standardise.measure(images)
    return selector


class PromptedImageData(lightning.LightningDataModule):
    """Batches (lists) of images with their prompts, split into training and validation images."""

    def __init__(self, images: PromptedImages, batch_size: int, validation: float, seed: int) -> None:
        super().__init__()
        self.images, self.batch_size, self.seed = images, batch_size, seed
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).tolist()
        held_out = max(1, round(validation * len(images)))
        self.validation, self.training = order[:held_out], order[held_out:]

    def train_dataloader(self) -> DataLoader[PromptedImage]:
        """Training images in an order drawn for each epoch; an incomplete last batch is dropped.

        Raises ValueError for fewer training images than one batch per device.
        """
        devices, _ = self._devices()
        share = len(self.training) // devices
        if share < self.batch_size:
            raise ValueError(
                f"distill.batch_size: {self.batch_size} is out of range, allowed: at most {share}, the "
                "training images per device"
            )
        return self._loader(self.training, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[PromptedImage]:
        """Validation images in a fixed order; some repeat if devices do not divide their number."""
        return self._loader(self.validation, shuffle=False, drop_last=False)

    def _loader(self, indices: Sequence[int], shuffle: bool, drop_last: bool) -> DataLoader[PromptedImage]:
        # torch's Subset uses nothing but length and items.
        subset: Subset[PromptedImage] = Subset(self.images, indices)  # type: ignore[arg-type]
        sampler: DistributedSampler[PromptedImage] = DistributedSampler(
            subset, *self._devices(), shuffle, self.seed, drop_last
        )
        return DataLoader(subset, self.batch_size, sampler=sampler, collate_fn=list, drop_last=drop_last)

    def _devices(self) -> tuple[int, int]:
        """Number of devices, and the rank of this one."""
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)


def train_selector(
    module: Distillation,
    data: PromptedImageData,
    checkpoints: Checkpoints,
    logger: Logger,
    **trainer_kwargs: Any,
) -> bool:
    """Train, or resume from the last of `checkpoints`; returns whether this is rank 0.

    Raises DivergedError, and ValueError for fewer training images than one batch per device.
    """
    # An answer may depend on a single token, whose gradient is then large.
    kwargs = trainer_kwargs | {"gradient_clip_val": 1.0}
    teacher = AskTeacher(module.reader, data.images, checkpoints)
    return fit(module, data, module.recipe.epochs, checkpoints, (teacher,), logger, **kwargs)
