"""What a selection is worth without a language model: restored features, text, overlap, stability.

A reducer that merges is measured by what it makes: features are restored from its new tokens, each in the
place that it stands at. Where these places are says little of it, as it reads the others too; so it has no
text coverage and no overlap.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any, Self

import torch
from torch import Tensor
from tqdm import tqdm

from atr.core.tokens import budget, mask_of
from atr.reduction.autoencoder import FeatureAutoencoder
from atr.reduction.base import EncoderOutput, Merger, Reducer
from atr.reduction.checked import select, select_merged
from atr.reduction.layer_schedule import LayerReducer
from atr.reduction.losses import unexplained_variance
from atr.reduction.registry import build_reducer
from atr.reduction.selector import FeatureSelector, SelectorReducer

Reducers = Mapping[str, Sequence[Reducer]]
"""By name; of one that draws, as many as seeds."""


@dataclass(frozen=True)
class Images:
    """A batch of held-out images; `text_BN` is how many characters have their centre in a token's patch."""

    encoded: EncoderOutput
    text_BN: Tensor

    @classmethod
    def of(cls, fields: Mapping[str, Any], centres: Sequence[Iterable[tuple[float, float]]]) -> Self:
        """From the fields of EncoderOutput, and the centres (x, y) of each image's characters in 0 <= x, y < 1.

        The encoder is taken to see the whole image.
        """
        encoded = EncoderOutput(**fields)
        assert encoded.grid
        text_BN = torch.stack([_text_N(written, encoded.grid) for written in centres])
        return cls(encoded, text_BN.to(encoded.features_BND.device))


def _text_N(centres: Iterable[tuple[float, float]], grid: tuple[int, int]) -> Tensor:
    rows, columns = grid
    places = [int(y * rows) * columns + int(x * columns) for x, y in centres]
    return torch.bincount(torch.tensor(places, dtype=torch.int64), minlength=rows * columns)


@dataclass(frozen=True)
class Kept:
    """What a reducer keeps of a batch: the mask, and the new tokens of one that merges.

    It holds no features of the batch: in float32 these are larger than the batch, for each budget and seed.
    """

    mask_BN: Tensor
    merged_BKD: Tensor | None = None

    @classmethod
    def of(cls, reducer: Reducer, encoded: EncoderOutput, keep: float) -> Self:
        """Ask a reducer for the fraction `keep` of the tokens."""
        count, merged_BKD = budget(keep, encoded.tokens), None
        if isinstance(reducer, Merger):
            keep_BK, merged_BKD = select_merged(reducer, encoded, count)
        else:
            keep_BK = select(reducer, encoded, count)
        return cls(mask_of(keep_BK, encoded.tokens), merged_BKD)

    def features_BND(self, encoded: EncoderOutput) -> Tensor:
        """The batch's features in float32, with the new tokens at the places kept."""
        features_BND = encoded.features_BND
        if self.merged_BKD is not None:
            features_BND = features_BND.masked_scatter(self.mask_BN.bool()[..., None], self.merged_BKD)
        return features_BND.float()


def made(
    names: Iterable[str], seeds: int, weights: Callable[[str], str | Path], given: Collection[str]
) -> tuple[dict[str, list[Reducer]], dict[str, str]]:
    """Reducers of these names (random of 0 to `seeds` - 1), and why the others cannot be measured.

    Those are left out that need more of an image than is `given`, and those inside a language model.
    `weights` gives the selector that one of a name is made of.
    """
    reducers: dict[str, list[Reducer]] = {}
    left_out: dict[str, str] = {}
    for name in names:
        drawn: list[Reducer] = []
        for seed in range(seeds if name == "random" else 1):
            reducer = build_reducer(name, seed, weights(name))
            if not isinstance(reducer, LayerReducer):
                drawn.append(reducer)
        if not drawn:
            left_out[name] = "chooses between the layers of a language model"
            continue
        if lacking := sorted(drawn[0].needs - set(given)):
            left_out[name] = f"needs {', '.join(lacking)}, which a language model gives"
        else:
            reducers[name] = drawn
    return reducers, left_out


def needs(reducers: Reducers) -> frozenset[str]:
    """What any of the reducers needs."""
    return frozenset().union(*(drawn[0].needs for drawn in reducers.values()))


@torch.inference_mode()
def measure(
    reducers: Reducers,
    nets: Mapping[str, FeatureAutoencoder],
    selectors: Sequence[FeatureSelector],
    images: Sequence[Images],
    keep: Sequence[float],
    overlap_keep: float,
) -> dict[str, Any]:
    """All measures: of each reducer at each of `keep`, its overlap with the others, and of `selectors`.

    `nets` restore features; each gives a line of its name.
    """
    lines = {name: worth(drawn, nets, images, keep) for name, drawn in tqdm(reducers.items(), "measure")}
    return {
        "keep": list(keep),
        "reducers": lines,
        "overlap": overlap(reducers, images, overlap_keep),
        "stability": stability(selectors, images, keep) if len(selectors) > 1 else None,
    }


def worth(
    drawn: Sequence[Reducer],
    nets: Mapping[str, FeatureAutoencoder],
    images: Sequence[Images],
    keep: Sequence[float],
) -> dict[str, list[float] | None]:
    """For each of `keep`, a mean over the seeds of one reducer: what each net leaves unexplained, and text.

    "text_coverage" is None where nothing is written on the images, or tokens are merged.
    """
    covers = any(batch.text_BN.any() for batch in images) and not isinstance(drawn[0], Merger)
    points = [_worth_at(fraction, drawn, nets, images, covers) for fraction in keep]
    lines: dict[str, list[float] | None] = {name: [point[name] for point in points] for name in nets}
    return lines | {"text_coverage": [point["text_coverage"] for point in points] if covers else None}


def _worth_at(
    fraction: float,
    drawn: Sequence[Reducer],
    nets: Mapping[str, FeatureAutoencoder],
    images: Sequence[Images],
    covers: bool,
) -> dict[str, float]:
    # One selection serves all measures: some reducers choose one token after the other.
    kept = [_kept(reducer, images, fraction) for reducer in drawn]
    point = {name: fmean(unexplained(net, images, each) for each in kept) for name, net in nets.items()}
    return point | ({"text_coverage": fmean(coverage(images, each) for each in kept)} if covers else {})


def unexplained(net: FeatureAutoencoder, images: Sequence[Images], kept: Sequence[Kept]) -> float:
    """Fraction of the features' variance that `net` does not restore from what is kept, over all tokens."""
    variance, total = net.selector.standardise.variance, 0.0
    for batch, part in zip(images, kept, strict=True):
        restored_BND = net.restore(part.features_BND(batch.encoded), part.mask_BN)
        error = unexplained_variance(restored_BND, batch.encoded.features_BND.float(), variance)
        total += len(restored_BND) * error.item()
    return total / sum(len(batch.text_BN) for batch in images)


def coverage(images: Sequence[Images], kept: Sequence[Kept]) -> float:
    """Fraction of all characters on the images whose token is kept."""
    pairs = zip(images, kept, strict=True)
    covered = sum((batch.text_BN * part.mask_BN).sum().item() for batch, part in pairs)
    return covered / sum(batch.text_BN.sum().item() for batch in images)


def overlap(reducers: Reducers, images: Sequence[Images], keep: float) -> dict[str, Any]:
    """IoU of the tokens that each two reducers keep, a mean over seeds and images; 1 with itself."""
    # One that draws has a mask for each seed; any other one mask, which is compared with them all.
    masks_SIN = {
        name: torch.stack([_mask_IN(reducer, images, keep) for reducer in drawn])
        for name, drawn in reducers.items()
        if not isinstance(drawn[0], Merger)
    }
    matrix = [[iou(one, other) for other in masks_SIN.values()] for one in masks_SIN.values()]
    return {"keep": keep, "names": list(masks_SIN), "iou": matrix}


def stability(
    selectors: Sequence[FeatureSelector], images: Sequence[Images], keep: Sequence[float]
) -> dict[str, Any]:
    """IoU of what selectors of different training seeds keep, a mean over their pairs and the images."""
    line = []
    for fraction in keep:
        masks = [_mask_IN(SelectorReducer(selector), images, fraction) for selector in selectors]
        line.append(fmean(iou(*pair) for pair in combinations(masks, 2)))
    return {"keep": list(keep), "seeds": len(selectors), "iou": line}


def iou(one: Tensor, other: Tensor) -> float:
    """Intersection over union of boolean masks (..., N), a mean over their other dimensions."""
    ratios = (one & other).sum(-1).double() / (one | other).sum(-1)
    return ratios.mean().item()


def curves(measured: Mapping[str, Any]) -> Iterator[tuple[float, dict[str, float]]]:
    """For each kept fraction the numbers that `measure` found there, named "reducer/measure"."""
    for place, keep in enumerate(measured["keep"]):
        lines = {
            f"{name}/{key}": line for name, each in measured["reducers"].items() for key, line in each.items()
        }
        if measured["stability"]:
            lines["selector/stability"] = measured["stability"]["iou"]
        yield keep, {name: line[place] for name, line in lines.items() if line is not None}


def _kept(reducer: Reducer, images: Sequence[Images], keep: float) -> list[Kept]:
    return [Kept.of(reducer, batch.encoded, keep) for batch in images]


def _mask_IN(reducer: Reducer, images: Sequence[Images], keep: float) -> Tensor:
    return torch.cat([part.mask_BN.bool() for part in _kept(reducer, images, keep)])
