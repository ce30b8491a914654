"""Reads the measures of each reducer without a language model, from stage intrinsic."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atr.reporting.cells import Provenance, cell_path, check_agreement, conditions_of, read_cells


@dataclass(frozen=True)
class IntrinsicCurves:
    """Measures of the tokens that one reducer keeps; each a value for every kept fraction.

    The reconstructions are unexplained variances of the features, 0 if all is restored: by the reconstructor
    trained with the selector, and by one trained on random masks.
    """

    reconstruction: list[float]
    reconstruction_random: list[float]
    text_coverage: list[float] | None
    """Fraction of the written characters whose centre lies in the patch of a kept token; None if the images
    have no known text, or if the reducer merges tokens."""


@dataclass(frozen=True)
class MaskIndices:
    """Kept tokens of a few images at one kept fraction, as indices in raster order."""

    keep: float
    images: list[str]
    kept: list[list[list[int]]]
    """By seed (one if the reducer is deterministic), then by image."""

    def __post_init__(self) -> None:
        if not self.kept:
            raise ValueError("kept: [] is not allowed, allowed: indices for one seed or more")
        for seed, masks in enumerate(self.kept):
            if len(masks) != len(self.images):
                raise ValueError(f"kept[{seed}]: {len(masks)} images, allowed: {len(self.images)}")
            if not all(indices and min(indices) >= 0 for indices in masks):
                raise ValueError(f"kept[{seed}]: allowed are one index or more an image, each 0 or above")


@dataclass(frozen=True)
class Stability:
    """Mean IoU of the tokens kept by selectors of different training seeds, by kept fraction."""

    keep: list[float]
    seeds: int
    iou: list[float]

    def __post_init__(self) -> None:
        if len(self.iou) != len(self.keep):
            raise ValueError(f"iou: {len(self.iou)} values, allowed: {len(self.keep)}")


@dataclass(frozen=True)
class IntrinsicCell:
    """One file of stage intrinsic: experiments/intrinsic/<reducer>/metrics.json."""

    reducer: str
    keep: list[float]
    lines: IntrinsicCurves
    masks: MaskIndices | None
    """None if the reducer merges tokens."""
    stability: Stability | None
    """Measured for the reducer `selector` alone, if it was trained with several seeds."""
    left_out: str
    parameters: dict[str, Any]
    provenance: Provenance
    resolved: dict[str, Any]

    def __post_init__(self) -> None:
        for key, values in vars(self.lines).items():
            if values is not None and len(values) != len(self.keep):
                raise ValueError(f"lines.{key}: {len(values)} values, allowed: {len(self.keep)}")


@dataclass(frozen=True)
class OverlapMatrix:
    """Mean IoU of the tokens that two reducers keep, a matrix in the order of `names`."""

    keep: float
    names: list[str]
    iou: list[list[float]]


@dataclass(frozen=True)
class IntrinsicResults:
    """The measures of all reducers, and how much their kept tokens overlap."""

    keep: list[float]
    reducers: dict[str, IntrinsicCurves]
    overlap: OverlapMatrix | None
    """None if no reducer has masks."""
    stability: Stability | None
    cells: dict[str, IntrinsicCell] = field(default_factory=dict)


def load_intrinsic(folder: Path, reducers: Sequence[str]) -> IntrinsicResults | None:
    """Read the cells of these reducers; a missing cell is left out. None if all are missing.

    Raises ValueError naming the file and the key if a cell is broken, or if two cells were measured at
    different kept fractions, on different images or with different parameters.
    """
    cells = read_cells(IntrinsicCell, folder, "intrinsic", reducers)
    if not cells:
        return None
    paths = {name: cell_path(folder, name) for name in cells}
    check_agreement({paths[name]: _conditions(cell) for name, cell in cells.items()}, "intrinsic")
    masks = {name: cell.masks for name, cell in cells.items() if cell.masks}
    check_agreement({paths[name]: _mask_conditions(part) for name, part in masks.items()}, "intrinsic")
    drawn = {name: part for name, part in masks.items() if len(part.kept) > 1}
    check_agreement({paths[name]: {"seeds": len(part.kept)} for name, part in drawn.items()}, "intrinsic")
    return IntrinsicResults(
        keep=next(iter(cells.values())).keep,
        reducers={name: cell.lines for name, cell in cells.items()},
        overlap=overlap_matrix(masks) if masks else None,
        stability=next((cell.stability for cell in cells.values() if cell.stability), None),
        cells=cells,
    )


def overlap_matrix(masks: dict[str, MaskIndices]) -> OverlapMatrix:
    """IoU of the tokens that two reducers keep, a mean over seeds and images; 1 with itself.

    Two random reducers are compared seed by seed; a deterministic one with every seed of the other.
    """
    tokens = 1 + max(
        index for part in masks.values() for seed in part.kept for kept in seed for index in kept
    )
    masks_SIN = [_boolean_masks(part, tokens) for part in masks.values()]
    matrix = [[_mean_iou(one, other) for other in masks_SIN] for one in masks_SIN]
    return OverlapMatrix(next(iter(masks.values())).keep, list(masks), matrix)


def _boolean_masks(part: MaskIndices, tokens: int) -> NDArray[np.bool_]:
    """Masks of S seeds, I images and N tokens, boolean (S, I, N)."""
    masks_SIN = np.zeros((len(part.kept), len(part.images), tokens), dtype=bool)
    for seed, images in enumerate(part.kept):
        for place, indices in enumerate(images):
            masks_SIN[seed, place, indices] = True
    return masks_SIN


def _mean_iou(one_SIN: NDArray[np.bool_], other_SIN: NDArray[np.bool_]) -> float:
    """Intersection over union, a mean over seeds and images; one seed is broadcast."""
    ratios_SI = (one_SIN & other_SIN).sum(-1) / (one_SIN | other_SIN).sum(-1)
    return float(ratios_SI.mean())


def _conditions(cell: IntrinsicCell) -> dict[str, Any]:
    return {"keep": cell.keep} | conditions_of(cell)


def _mask_conditions(masks: MaskIndices) -> dict[str, Any]:
    return {"masks.keep": masks.keep, "masks.images": masks.images}
