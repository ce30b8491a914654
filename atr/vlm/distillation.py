"""Distillation: a selector learns from the frozen language model which tokens its answers depend on.

The paper's autoencoder keeps what a reconstructor cannot restore. What it restores, though, a language model
that was never taught to may not see. Here the reader is the language model itself: a token is worth little if
the model answers the same without it. Shapes: B images, N tokens of a tile, P packed tokens of an image, L
tokens of a sequence, A answer tokens of a batch, V words.
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

TOP_K = (0.1, 0.3, 0.5)
"""Kept fractions at which validation compares the answers."""
FLOOR = 1e-3
"""Of the weight that attention gives a dropped token: at none, no gradient could tell what it is worth."""

Asked = tuple[str, list[str]]
"""The name of an image, and the prompts it is asked."""


class AskedImages(Protocol):
    """Images with their prompts, by index."""

    def __len__(self) -> int:
        """Number of images."""

    def __getitem__(self, index: int, /) -> Asked:
        """One of them."""


class Distillation(RecordedTraining):
    """Minimises the divergence of the model's answers from those it gives with all tokens.

    Tokens are dropped by attention that leaves them out; the others have the positions of the answerer's
    settings. The budget of each image is drawn anew at every step. The model learns nothing and is no part of
    the checkpoint.
    """

    def __init__(self, selector: FeatureSelector, answerer: Generator, recipe: "Distill", seed: int) -> None:
        """Raises ValueError for an attention that takes no mask of weights."""
        super().__init__()
        attention = str(answerer.model.config.get_text_config()._attn_implementation)
        if attention not in ("eager", "sdpa"):
            raise ValueError(f"attention: {attention} takes no weights of tokens, allowed: eager, sdpa")
        self.selector, self.answerer, self.recipe, self.seed = selector, answerer, recipe, seed
        self._answered: dict[str, list[str]] = {}

    def on_fit_start(self) -> None:
        """Put the language model where the selector is."""
        self.answerer.model.to(self.device)

    def training_step(self, batch: Sequence[Asked], batch_idx: int) -> Tensor:
        """The divergence under a sampled set of tokens of each image."""
        noise = step_noise(self, self.seed)
        sampled = partial(self._sampled, generator=noise)
        divergence, _ = self._compared(batch, [sampled])[0]
        if not bool(divergence.isfinite()):
            raise DivergedError(
                f"the divergence is {divergence.item()} at step {self.global_step}: lower "
                f"distill.learning_rate ({self.recipe.learning_rate}) or set trainer.precision: 32-true"
            )
        options: Any = {"on_epoch": True, "sync_dist": True, "batch_size": len(batch)}
        self.log("train/divergence", divergence, prog_bar=True, **options)
        self.log("train/learning_rate", self.trainer.optimizers[0].param_groups[0]["lr"])
        return divergence

    def validation_step(self, batch: Sequence[Asked], batch_idx: int) -> None:
        """Divergence, and the fraction of answer tokens that stay the same, with the best tokens alone."""
        best = [partial(self._best, keep=keep) for keep in TOP_K]
        for keep, (divergence, agreement) in zip(TOP_K, self._compared(batch, best), strict=True):
            metrics = {f"validation/divergence_{keep}": divergence, f"validation/agreement_{keep}": agreement}
            self.log_dict(metrics, sync_dist=True, batch_size=len(batch))

    def _sampled(self, scores_P: Tensor, generator: torch.Generator) -> Tensor:
        low, high = (budget(keep, len(scores_P)) for keep in (self.recipe.lowest, self.recipe.highest))
        k_1 = torch.randint(low, high + 1, (1,), generator=generator, device=scores_P.device)
        return top_k_mask_BN(scores_P[None], k_1, self.recipe.temperature, generator)[0]

    def _best(self, scores_P: Tensor, keep: float) -> Tensor:
        return mask_of(top_k_BK(scores_P, budget(keep, len(scores_P))), len(scores_P))

    def _compared(
        self, batch: Sequence[Asked], masks: Sequence[Callable[[Tensor], Tensor]]
    ) -> list[tuple[Tensor, Tensor]]:
        """Divergence and agreement under each of `masks`, which make a mask (P,) of an image's scores."""
        prepared, answers_BL = self._conversations(batch)
        whole = prepared.reduce(Full(), Policy(1.0))
        with torch.no_grad():
            expected_AV = self._words(whole, answers_BL, None)
        compared = []
        for mask in masks:
            weights = self._weights(prepared, mask)
            found_AV = self._words(whole, answers_BL, weights)
            divergence_A = functional.kl_div(found_AV, expected_AV, reduction="none", log_target=True).sum(1)
            same_A = found_AV.argmax(1) == expected_AV.argmax(1)
            agreement = same_A.sum() / max(1, len(same_A))
            compared.append((_mean_of_rows(divergence_A, answers_BL), agreement))
        return compared

    def _conversations(self, batch: Sequence[Asked]) -> tuple[Prepared, Tensor]:
        """Each image with its prompts and the model's own answers, and which tokens are answers (B, L)."""
        self._ask([asked for asked in batch if asked[0] not in self._answered])
        turns = [
            [turn for pair in zip(prompts, self._answered[name], strict=True) for turn in pair]
            for name, prompts in batch
        ]
        with torch.no_grad():
            prepared = self.answerer.source.prepare([[name] for name, _ in batch], turns)
        prompts = Prompts(self.answerer.processor)
        length = prepared.inputs["input_ids"].shape[1]
        rows = [_answers_L(prompts, conversation, length) for conversation in turns]
        return prepared, torch.stack(rows).to(self.device)

    def _ask(self, batch: Sequence[Asked]) -> None:
        """Remember the model's answers to images it was not asked about before."""
        asked = [(name, prompt) for name, prompts in batch for prompt in prompts]
        if asked:
            images, questions = [[name] for name, _ in asked], [prompt for _, prompt in asked]
            replies = self.answerer.answer(self.answerer.prepare(images, questions), Full(), 1.0)
            # A placeholder that the model spells out would stand for one more image.
            placeholder = self.answerer.processor.image_token
            for (name, _), (answer, *_) in zip(asked, replies, strict=True):
                self._answered.setdefault(name, []).append(answer.replace(placeholder, ""))

    def _weights(self, prepared: Prepared, mask: Callable[[Tensor], Tensor]) -> Tensor:
        """The mask of all packed tokens of the batch, of newlines 1; its gradient reaches the selector."""
        encoded = prepared.encoded
        scores_BN = self.selector(encoded.features_BND.float(), encoded.grid)
        weights = []
        for scores_P1, tile_P in zip(
            prepared.packing.values(scores_BN.unsqueeze(-1)), prepared.packing.tile_of, strict=True
        ):
            visual_P = (tile_P != ROW_END).to(scores_P1.device)
            ones_P = torch.ones_like(scores_P1[:, 0])
            weights.append(ones_P.masked_scatter(visual_P, mask(scores_P1[visual_P, 0]).to(ones_P.dtype)))
        return torch.cat([weights[image] for image in prepared.image_of])

    def _words(self, whole: Mapping[str, Any], answers_BL: Tensor, weights: Tensor | None) -> Tensor:
        """Log probabilities (A, V) of the answers' tokens, all visual tokens attended to by their weights."""
        model, inputs = self.answerer.model, dict(whole)
        real_BL = counted_BL = inputs["attention_mask"]
        if weights is not None:
            image_BL = inputs["input_ids"] == model.config.image_token_id
            weights_BL = torch.ones_like(real_BL, dtype=torch.float32).masked_scatter(image_BL, weights)
            inputs["attention_mask"] = _attention(weights_BL, real_BL).to(model.dtype)
            if self.answerer.settings.positions == "contiguous":
                counted_BL = real_BL * (weights_BL > 0.5)  # masks are 0 or 1; what is dropped closes up
        inputs["position_ids"] = (counted_BL.long().cumsum(1) - 1).clamp(min=0)
        # The words of a token are told by the one before it.
        first = int((answers_BL.cumsum(1).amax(0) == 0).sum())
        kept = answers_BL.shape[1] - first + 1
        logits_BLV = model(**inputs, use_cache=False, logits_to_keep=kept).logits[:, :-1]
        words_AV: Tensor = logits_BLV[answers_BL[:, first:]].float().log_softmax(-1)
        return words_AV

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with a linear warm-up and a cosine fall to zero."""
        return optimizers(self, self.recipe)


def _answers_L(prompts: Prompts, turns: Sequence[str], length: int) -> Tensor:
    """Which tokens of a left-padded conversation are answers, what ends a turn among them; bool (L,)."""
    is_answer_L = torch.zeros(length, dtype=torch.bool)
    # Counted from the end, where neither padding nor the tokens of the image are in the way.
    whole = prompts.length(turns)
    for asked in range(1, len(turns), 2):
        before, after = prompts.length(turns[:asked]), prompts.length(turns[: asked + 1])
        is_answer_L[length - whole + before : length - whole + after] = True
    return is_answer_L


def _attention(weights_BL: Tensor, real_BL: Tensor) -> Tensor:
    """The causal mask that adds the logarithm of each token's weight to its attention; (B, 1, L, L).

    A token always attends to itself: what one makes of itself that no other sees changes nothing.
    """
    length = weights_BL.shape[1]
    itself_LL = torch.eye(length, dtype=torch.bool, device=weights_BL.device)
    ahead_LL = torch.ones_like(itself_LL).triu(1)
    bias_BL = (FLOOR + (1 - FLOOR) * weights_BL).log()
    hidden_BLL = ahead_LL | ~real_BL.bool()[:, None, :]
    lowest = torch.finfo(bias_BL.dtype).min
    bias_BLL = bias_BL[:, None, :].expand(-1, length, -1).masked_fill(hidden_BLL, lowest)
    return bias_BLL.masked_fill(itself_LL, 0.0)[:, None]


def _mean_of_rows(values_A: Tensor, answers_BL: Tensor) -> Tensor:
    """Mean over each image's answer tokens, then over images: long answers must not drown the short ones."""
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
    """An untrained one that prefers no number of tokens, standardised by the features_ND of `images`.

    Raises ValueError for heads that do not divide the width.
    """
    shape = recipe.layers, recipe.heads, recipe.ffn_ratio, recipe.position
    selector = FeatureSelector(width, grid, *shape, initial_bias=0.0, encoder=encoder, layer=layer)
    selector.standardise.measure(images)
    return selector


class AskedData(lightning.LightningDataModule):
    """Images with their prompts in batches: lists, shuffled anew every epoch; some are held out."""

    def __init__(self, images: AskedImages, batch_size: int, validation: float, seed: int) -> None:
        super().__init__()
        self.images, self.batch_size, self.seed = images, batch_size, seed
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).tolist()
        held_out = max(1, round(validation * len(images)))
        self.validation, self.training = order[:held_out], order[held_out:]

    def train_dataloader(self) -> DataLoader[Asked]:
        """A new order every epoch, which is that epoch's alone; the last, incomplete batch is left out.

        Raises ValueError for fewer images than one batch for each device.
        """
        devices, _ = self._devices()
        share = len(self.training) // devices
        if share < self.batch_size:
            raise ValueError(
                f"distill.batch_size: {self.batch_size} is out of range, allowed: at most {share}, the "
                "images of a device that are not held out"
            )
        return self._loader(self.training, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[Asked]:
        """The held-out images in a fixed order; over several devices some may repeat to come out even."""
        return self._loader(self.validation, shuffle=False, drop_last=False)

    def _loader(self, places: Sequence[int], shuffle: bool, drop_last: bool) -> DataLoader[Asked]:
        chosen: Subset[Asked] = Subset(self.images, places)  # type: ignore[arg-type]  # length and items will do
        sampler: DistributedSampler[Asked] = DistributedSampler(
            chosen, *self._devices(), shuffle, self.seed, drop_last
        )
        return DataLoader(chosen, self.batch_size, sampler=sampler, collate_fn=list, drop_last=drop_last)

    def _devices(self) -> tuple[int, int]:
        """Their number, and which one this is."""
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)


def train(
    module: Distillation, data: AskedData, checkpoints: Checkpoints, logger: Logger, **trainer_kwargs: Any
) -> bool:
    """Train, going on from the last of `checkpoints` if there is one; whether this is rank 0.

    Raises DivergedError, and ValueError for fewer images than one batch.
    """
    # One token may be all that an answer hangs on.
    kwargs = trainer_kwargs | {"gradient_clip_val": 1.0}
    return fit(module, data, module.recipe.epochs, checkpoints, (), logger, **kwargs)
