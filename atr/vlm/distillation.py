"""Distillation: a selector learns from the frozen language model which tokens its answers depend on.

The paper's autoencoder keeps the tokens that a reconstructor cannot restore. But features that a trained
reconstructor can recover may be invisible to a frozen language model. Here the language model itself is the
judge: a token is worth little if the answers do not change without it.

Shapes: B images, N tokens of a tile, P packed tokens of an image, L tokens of a sequence, A answer tokens of
a batch, V words of the vocabulary.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import lightning
import torch
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, DistributedSampler, Subset

from atr.core.tokens import budget, mask_of, top_k_BK, top_k_mask_BN
from atr.reduction import FeatureSelector, Full
from atr.reduction.checkpoints import Checkpoints
from atr.reduction.pretraining import DivergedError, RecordedTraining, fit, optimizers, step_noise
from atr.vlm.generation import Generator
from atr.vlm.inputs import Prompts
from atr.vlm.policy import Policy
from atr.vlm.reduce import Prepared
from atr.vlm.tiling import ROW_END

if TYPE_CHECKING:
    from atr.config.distill import Distill

COMPARED_KEEP = (0.1, 0.3, 0.5)
"""Kept fractions at which validation compares the answers."""
DROPPED_WEIGHT = 1e-3
"""Attention weight left to a dropped token; at zero it would get no gradient."""

PromptedImage = tuple[str, list[str]]
"""The name of an image and its prompts."""


class PromptedImages(Protocol):
    """A sequence of images with their prompts, such as a list."""

    def __len__(self) -> int:
        """Number of images."""

    def __getitem__(self, index: int, /) -> PromptedImage:
        """One image with its prompts."""


class Distillation(RecordedTraining):
    """Trains a selector to minimise the divergence of the model's answers from those with all tokens.

    Dropped tokens are masked in attention; the kept ones have the positions of the generator's settings. The
    budget of each image is drawn at every step. The model is frozen and not part of the checkpoint.
    """

    def __init__(self, selector: FeatureSelector, generator: Generator, recipe: "Distill", seed: int) -> None:
        """Raise ValueError for an attention kernel without an additive mask."""
        super().__init__()
        attention = str(generator.model.config.get_text_config()._attn_implementation)
        if attention not in ("eager", "sdpa"):
            raise ValueError(f"attention: {attention} takes no additive mask, allowed: eager, sdpa")
        self.selector, self.generator, self.recipe, self.seed = selector, generator, recipe, seed
        self._answered: dict[str, list[str]] = {}

    def on_fit_start(self) -> None:
        """Move the language model to the selector's device."""
        self.generator.model.to(self.device)

    def training_step(self, batch: Sequence[PromptedImage], batch_idx: int) -> Tensor:
        """The divergence under a sampled set of tokens of each image; raises DivergedError if not finite."""
        noise = step_noise(self, self.seed)
        sample = partial(self._sample_mask, noise=noise)
        divergence, _ = self._compare(batch, [sample])[0]
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
        best = [partial(self._best_mask, keep=keep) for keep in COMPARED_KEEP]
        for keep, (divergence, agreement) in zip(COMPARED_KEEP, self._compare(batch, best), strict=True):
            metrics = {f"validation/divergence_{keep}": divergence, f"validation/agreement_{keep}": agreement}
            self.log_dict(metrics, sync_dist=True, batch_size=len(batch))

    def _sample_mask(self, scores_P: Tensor, noise: torch.Generator) -> Tensor:
        low, high = (budget(keep, len(scores_P)) for keep in (self.recipe.lowest, self.recipe.highest))
        k_1 = torch.randint(low, high + 1, (1,), generator=noise, device=scores_P.device)
        return top_k_mask_BN(scores_P[None], k_1, self.recipe.temperature, noise)[0]

    def _best_mask(self, scores_P: Tensor, keep: float) -> Tensor:
        return mask_of(top_k_BK(scores_P, budget(keep, len(scores_P))), len(scores_P))

    def _compare(
        self, batch: Sequence[PromptedImage], masks: Sequence[Callable[[Tensor], Tensor]]
    ) -> list[tuple[Tensor, Tensor]]:
        """Divergence and agreement under each of `masks`, functions from an image's scores to a mask (P,)."""
        prepared, answers_BL = self._conversations(batch)
        whole = prepared.reduce(Full(), Policy(1.0))
        with torch.no_grad():
            expected_AV = self._log_probabilities(whole, answers_BL, None)
        compared = []
        for mask in masks:
            weights = self._weights(prepared, mask)
            actual_AV = self._log_probabilities(whole, answers_BL, weights)
            divergence_A = functional.kl_div(actual_AV, expected_AV, reduction="none", log_target=True).sum(1)
            same_A = actual_AV.argmax(1) == expected_AV.argmax(1)
            agreement = same_A.sum() / max(1, len(same_A))
            compared.append((_mean_of_rows(divergence_A, answers_BL), agreement))
        return compared

    def _conversations(self, batch: Sequence[PromptedImage]) -> tuple[Prepared, Tensor]:
        """Each image's prompts with the model's own answers to them; bool (B, L) marks the answers."""
        self._answer([image for image in batch if image[0] not in self._answered])
        turns = [
            [turn for pair in zip(prompts, self._answered[name], strict=True) for turn in pair]
            for name, prompts in batch
        ]
        with torch.no_grad():
            prepared = self.generator.source.prepare([[name] for name, _ in batch], turns)
        prompts = Prompts(self.generator.processor)
        length = prepared.inputs["input_ids"].shape[1]
        rows = [_mark_answers(prompts, conversation, length) for conversation in turns]
        return prepared, torch.stack(rows).to(self.device)

    def _answer(self, batch: Sequence[PromptedImage]) -> None:
        """Answer the prompts of new images with all tokens, and remember the answers."""
        pairs = [(name, prompt) for name, prompts in batch for prompt in prompts]
        if not pairs:
            return
        images, questions = [[name] for name, _ in pairs], [prompt for _, prompt in pairs]
        replies = self.generator.answer(self.generator.prepare(images, questions), Full(), 1.0)
        # A placeholder spelled out in an answer would stand for one more image.
        placeholder = self.generator.processor.image_token
        for (name, _), (answer, *_) in zip(pairs, replies, strict=True):
            self._answered.setdefault(name, []).append(answer.replace(placeholder, ""))

    def _weights(self, prepared: Prepared, mask: Callable[[Tensor], Tensor]) -> Tensor:
        """The mask of all packed tokens of the batch, 1 for newlines; its gradient reaches the selector."""
        encoded = prepared.encoded
        scores_BN = self.selector(encoded.features_BND.float(), encoded.grid)
        weights = []
        for scores_P1, tile_P in zip(
            prepared.layout.values(scores_BN.unsqueeze(-1)), prepared.layout.tile_of, strict=True
        ):
            visual_P = (tile_P != ROW_END).to(scores_P1.device)
            ones_P = torch.ones_like(scores_P1[:, 0])
            weights.append(ones_P.masked_scatter(visual_P, mask(scores_P1[visual_P, 0]).to(ones_P.dtype)))
        return torch.cat([weights[image] for image in prepared.image_of])

    def _log_probabilities(
        self, whole: Mapping[str, Any], answers_BL: Tensor, weights: Tensor | None
    ) -> Tensor:
        """Log probabilities (A, V) at the answer tokens, with visual tokens weighted in attention."""
        model, inputs = self.generator.model, dict(whole)
        real_BL = counted_BL = inputs["attention_mask"]
        if weights is not None:
            image_BL = inputs["input_ids"] == model.config.image_token_id
            weights_BL = torch.ones_like(real_BL, dtype=torch.float32).masked_scatter(image_BL, weights)
            inputs["attention_mask"] = _attention_mask(weights_BL, real_BL).to(model.dtype)
            if self.generator.settings.positions == "contiguous":
                counted_BL = real_BL * (weights_BL > 0.5)  # masks are 0 or 1; dropped tokens take no position
        inputs["position_ids"] = (counted_BL.long().cumsum(1) - 1).clamp(min=0)
        # A token is predicted at the position before it.
        first = int((answers_BL.cumsum(1).amax(0) == 0).sum())
        kept = answers_BL.shape[1] - first + 1
        logits_BLV = model(**inputs, use_cache=False, logits_to_keep=kept).logits[:, :-1]
        log_probabilities_AV: Tensor = logits_BLV[answers_BL[:, first:]].float().log_softmax(-1)
        return log_probabilities_AV

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with linear warm-up and cosine decay to zero."""
        return optimizers(self, self.recipe)


def _mark_answers(prompts: Prompts, turns: Sequence[str], length: int) -> Tensor:
    """Mark the answers of a left-padded conversation, with their end-of-turn tokens; bool (L,)."""
    is_answer_L = torch.zeros(length, dtype=torch.bool)
    # Counted from the end, as padding and image tokens stand before the text.
    whole = prompts.length(turns)
    for turn in range(1, len(turns), 2):
        before, after = prompts.length(turns[:turn]), prompts.length(turns[: turn + 1])
        is_answer_L[length - whole + before : length - whole + after] = True
    return is_answer_L


def _attention_mask(weights_BL: Tensor, real_BL: Tensor) -> Tensor:
    """The causal additive mask (B, 1, L, L) with the logarithm of each token's weight.

    A token always attends to itself, which changes nothing if no other token attends to it.
    """
    length = weights_BL.shape[1]
    itself_LL = torch.eye(length, dtype=torch.bool, device=weights_BL.device)
    ahead_LL = torch.ones_like(itself_LL).triu(1)
    bias_BL = (DROPPED_WEIGHT + (1 - DROPPED_WEIGHT) * weights_BL).log()
    hidden_BLL = ahead_LL | ~real_BL.bool()[:, None, :]
    lowest = torch.finfo(bias_BL.dtype).min
    bias_BLL = bias_BL[:, None, :].expand(-1, length, -1).masked_fill(hidden_BLL, lowest)
    return bias_BLL.masked_fill(itself_LL, 0.0)[:, None]


def _mean_of_rows(values_A: Tensor, answers_BL: Tensor) -> Tensor:
    """Mean over the answer tokens of each image, then over images, so that long answers weigh no more."""
    counts_B = answers_BL.sum(1)
    weights_A = (1 / counts_B).repeat_interleave(counts_B)
    return (values_A * weights_A).sum() / len(counts_B)


def new_selector(
    recipe: "Distill",
    width: int,
    grid: tuple[int, int],
    encoder: str,
    layer: int,
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
    return fit(module, data, module.recipe.epochs, checkpoints, (), logger, **kwargs)
