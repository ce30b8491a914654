"""Intrinsic measures of a selection, without a language model: reconstruction, text coverage, stability.

A merging reducer is measured by its merged tokens: features are reconstructed from these, each at its index.
The index says little about a token that mixes several others, so a merger has no text coverage and no masks.
The images of a batch share a grid, which other batches need not have: all measures are means over images.
Shapes: see `atr.core.tokens`.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path
from statistics import fmean
from typing import Any, Self

import torch
from torch import Tensor

from atr.core.tokens import budget, mask_of
from atr.reduction.autoencoder import FeatureAutoencoder
from atr.reduction.base import EncoderOutput, Merger, Reducer
from atr.reduction.checked import select, select_merged
from atr.reduction.layer_schedule import LEFT_OUT, LayerReducer
from atr.reduction.losses import unexplained_variance
from atr.reduction.selector import FeatureSelector, SelectorReducer


@dataclass(frozen=True)
class HeldOutBatch:
    """Held-out images; `text_BN` counts the characters whose centre lies in a token's patch."""

    encoded: EncoderOutput
    text_BN: Tensor

    @classmethod
    def of(cls, fields: Mapping[str, Any], centres: Sequence[Iterable[tuple[float, float]]]) -> Self:
        """Build it from the fields of EncoderOutput and each image's character centres (x, y), 0 <= x, y < 1.

        Assumes that the encoder sees the whole image.
        """
        encoded = EncoderOutput(**fields)
        assert encoded.grid
        text_BN = torch.stack([_text_N(image, encoded.grid) for image in centres])
        return cls(encoded, text_BN.to(encoded.features_BND.device))


def _text_N(centres: Iterable[tuple[float, float]], grid: tuple[int, int]) -> Tensor:
    rows, columns = grid
    places = [int(y * rows) * columns + int(x * columns) for x, y in centres]
    return torch.bincount(torch.tensor(places, dtype=torch.int64), minlength=rows * columns)


@dataclass(frozen=True)
class Selection:
    """The tokens that a reducer keeps of a batch: their mask, and the new tokens of a merger.

    It does not hold the features: in float32, for each budget and seed, they would be larger than the batch.
    """

    mask_BN: Tensor
    merged_BKD: Tensor | None = None

    @classmethod
    def of(cls, reducer: Reducer, encoded: EncoderOutput, keep: float) -> Self:
        """Select the fraction `keep` of the tokens."""
        count, merged_BKD = budget(keep, encoded.tokens), None
        if isinstance(reducer, Merger):
            keep_BK, merged_BKD = select_merged(reducer, encoded, count)
        else:
            keep_BK = select(reducer, encoded, count)
        return cls(mask_of(keep_BK, encoded.tokens), merged_BKD)

    def features_BND(self, encoded: EncoderOutput) -> Tensor:
        """The batch's features in float32, with the new tokens at the kept indices."""
        features_BND = encoded.features_BND
        if self.merged_BKD is not None:
            features_BND = features_BND.masked_scatter(self.mask_BN.bool()[..., None], self.merged_BKD)
        return features_BND.float()


def why_not_measurable(
    reducer: Reducer | LayerReducer, available: Collection[str], giver: str = "a language model"
) -> str:
    """Why a reducer cannot be measured without a language model; empty if it can.

    `available` names the optional fields of EncoderOutput that can be computed, and `giver` is what gives the
    others.
    """
    if isinstance(reducer, LayerReducer):
        return LEFT_OUT
    if missing := sorted(reducer.needs - set(available)):
        return f"needs {', '.join(missing)}, which {giver} gives"
    return ""


def measure(
    by_seed: Sequence[Reducer],
    nets: Mapping[str, Path],
    selectors: Sequence[Path],
    images: Sequence[HeldOutBatch],
    keep: Sequence[float],
    overlap_keep: float,
    device: torch.device,
) -> dict[str, Any]:
    """Lines and masks of a reducer, by the autoencoders saved in `nets`; stability of `selectors`, if any."""
    loaded = {name: FeatureAutoencoder.from_pretrained(folder).to(device) for name, folder in nets.items()}
    trained = [FeatureSelector.from_pretrained(folder).to(device) for folder in selectors]
    kept = kept_indices(by_seed, images, overlap_keep)
    return {
        "lines": measure_lines(by_seed, loaded, images, keep),
        "masks": {"keep": overlap_keep, "kept": kept} if kept else None,
        "stability": selector_stability(trained, images, keep) if trained else None,
    }


@torch.inference_mode()
def measure_lines(
    drawn: Sequence[Reducer],
    nets: Mapping[str, FeatureAutoencoder],
    images: Sequence[HeldOutBatch],
    keep: Sequence[float],
) -> dict[str, list[float] | None]:
    """For each of `keep`, the variance that each net leaves unexplained, and the text coverage.

    `drawn` is one reducer, or a random one under several seeds; values are means over the seeds.
    "text_coverage" is None where the images show no text, and for mergers.
    """
    covers = any(batch.text_BN.any() for batch in images) and not isinstance(drawn[0], Merger)
    wholes = {name: sum(len(batch.text_BN) for batch in images) for name in nets}
    if covers:
        wholes["text_coverage"] = sum(int(batch.text_BN.sum()) for batch in images)
    sums = {name: [[0.0] * len(drawn) for _ in keep] for name in wholes}
    # All fractions of a batch before the next one, because reducers reuse the scores of the last batch.
    for batch, (seed, reducer), (place, fraction) in product(images, enumerate(drawn), enumerate(keep)):
        for name, value in _measure_batch(batch, reducer, fraction, nets, covers).items():
            sums[name][place][seed] += value
    lines: dict[str, list[float] | None] = {
        name: [fmean(total / whole for total in sums[name][place]) for place in range(len(keep))]
        for name, whole in wholes.items()
    }
    return {"text_coverage": None, **lines}


def _measure_batch(
    batch: HeldOutBatch,
    reducer: Reducer,
    fraction: float,
    nets: Mapping[str, FeatureAutoencoder],
    covers: bool,
) -> dict[str, float]:
    # One selection serves all measures, because reducers that choose token by token are slow.
    selection = Selection.of(reducer, batch.encoded, fraction)
    sums = {name: unexplained(net, batch, selection) for name, net in nets.items()}
    if covers:
        sums["text_coverage"] = covered_characters(batch, selection)
    return sums


def unexplained(net: FeatureAutoencoder, batch: HeldOutBatch, selection: Selection) -> float:
    """Fraction of the variance that `net` does not reconstruct from the kept features, summed over images."""
    restored_BND = net.restore(selection.features_BND(batch.encoded), selection.mask_BN, batch.encoded.grid)
    variance = net.selector.standardise.variance
    error = unexplained_variance(restored_BND, batch.encoded.features_BND.float(), variance)
    return len(restored_BND) * error.item()


def covered_characters(batch: HeldOutBatch, selection: Selection) -> float:
    """Number of the characters on the images whose token is kept."""
    return (batch.text_BN * selection.mask_BN).sum().item()


@torch.inference_mode()
def kept_indices(
    drawn: Sequence[Reducer], images: Sequence[HeldOutBatch], keep: float
) -> list[list[list[int]]] | None:
    """Kept indices by seed and image, to compute the overlap of two reducers from; None for mergers."""
    if isinstance(drawn[0], Merger):
        return None
    return [
        [mask_N.nonzero()[:, 0].tolist() for mask_BN in _masks(one, images, keep) for mask_N in mask_BN]
        for one in drawn
    ]


@torch.inference_mode()
def selector_stability(
    selectors: Sequence[FeatureSelector], images: Sequence[HeldOutBatch], keep: Sequence[float]
) -> dict[str, Any]:
    """IoU of the tokens that selectors of different training seeds keep, a mean over pairs and images."""
    line = []
    for fraction in keep:
        masks = [_masks(SelectorReducer(selector), images, fraction) for selector in selectors]
        line.append(fmean(iou(*pair) for pair in combinations(masks, 2)))
    return {"keep": list(keep), "seeds": len(selectors), "iou": line}


def iou(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Intersection over union of boolean masks (B, N), a mean over the images of all batches."""
    ratios = [(a & b).sum(-1).double() / (a | b).sum(-1) for a, b in zip(one, other, strict=True)]
    return torch.cat(ratios).mean().item()


def intrinsic_curves(measured: Mapping[str, Any]) -> Iterator[tuple[float, dict[str, float]]]:
    """For each kept fraction the values measured of one reducer, by name of the measure."""
    lines = dict(measured["lines"])
    if measured["stability"]:
        lines["stability"] = measured["stability"]["iou"]
    for place, keep in enumerate(measured["keep"]):
        yield keep, {name: line[place] for name, line in lines.items() if line is not None}


def _masks(reducer: Reducer, images: Sequence[HeldOutBatch], keep: float) -> list[Tensor]:
    """mask_BN of each batch."""
    return [Selection.of(reducer, batch.encoded, keep).mask_BN.bool() for batch in images]
