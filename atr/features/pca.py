"""PCA picture: an image's patches, coloured by the first three principal components of their features.

Shapes: see atr.core.tokens; R rows and C columns of the patch grid.
"""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from atr.core.ragged import Grid
from atr.features.encoder import Encoder

PICTURE_SIDE = 384
"""Approximate length in pixels of the longer side of one picture."""

_Floats = NDArray[np.floating[Any]]
_Pair = tuple[Image.Image, Image.Image]


@torch.inference_mode()
def pca_picture(encoder: Encoder, images: Sequence[Image.Image]) -> bytes:
    """PNG of the images in a row, each followed by its patches in their `pca_colours`.

    Images are cropped around their centre to the shape of the encoder's grid, unless the encoder gives them
    grids of their own. The encoder must be on the CPU in float32, as loaded, so that the bytes do not depend
    on the device and precision of an extraction.
    """
    encode = _encode_ragged if encoder.is_ragged else _encode_rectangular
    shown = [side for pair in encode(encoder, images) for side in pair]
    picture = Image.new("RGB", (sum(side.width for side in shown), max(side.height for side in shown)))
    left = 0
    for side in shown:
        picture.paste(side, (left, 0))
        left += side.width
    buffer = io.BytesIO()
    picture.save(buffer, format="png")
    return buffer.getvalue()


def _encode_rectangular(encoder: Encoder, images: Sequence[Image.Image]) -> list[_Pair]:
    """The cropped images, each with the picture of its patches."""
    size = _size(encoder.grid)
    cropped = [ImageOps.fit(image.convert("RGB"), size) for image in images]
    features_BND = encoder(encoder.preprocess(cropped)).numpy()
    return [
        (image, _patches(features_ND, encoder.grid))
        for image, features_ND in zip(cropped, features_BND, strict=True)
    ]


def _encode_ragged(encoder: Encoder, images: Sequence[Image.Image]) -> list[_Pair]:
    """The whole images, each in the shape of its own grid, with the picture of its patches."""
    whole = [image.convert("RGB") for image in images]
    encoded = encoder.images(encoder.preprocess(whole))
    return [
        (image.resize(_size(grid)), _patches(features_ND.numpy(), grid))
        for image, (features_ND, grid) in zip(whole, encoded, strict=True)
    ]


def _size(grid: Grid) -> tuple[int, int]:
    """Width and height of a picture, in pixels."""
    cell = max(1, PICTURE_SIDE // max(grid))
    return grid[1] * cell, grid[0] * cell


def _patches(features_ND: _Floats, grid: Grid) -> Image.Image:
    patches_RC3 = np.rint(255 * pca_colours(features_ND.reshape(*grid, -1))).astype(np.uint8)
    return Image.fromarray(patches_RC3).resize(_size(grid), Image.Resampling.NEAREST)


def pca_colours(features_RCD: _Floats) -> _Floats:
    """RGB in 0..1 of each patch: the first three principal components of one image's features; (R, C, 3).

    Each component is scaled so that its 1st and 99th percentiles become 0 and 1. A component that does not
    exist, as there are too few patches or channels, is 0.
    """
    rows, columns, width = features_RCD.shape
    components_N3 = _principal_components(features_RCD.reshape(-1, width).astype(np.float64))
    low, high = np.percentile(components_N3, [1, 99], axis=0)
    span = np.where(high > low, high - low, 1.0)
    colours_N3: _Floats = ((components_N3 - low) / span).clip(0, 1)
    return colours_N3.reshape(rows, columns, 3)


def _principal_components(features_ND: _Floats) -> _Floats:
    """Projections (N, 3) on the first three principal axes; the largest entry of each axis is positive."""
    centred_ND = features_ND - features_ND.mean(axis=0)
    left_NK, singular_K, axes_KD = np.linalg.svd(centred_ND, full_matrices=False)
    largest_K = np.abs(axes_KD).argmax(axis=1)
    signs_K = np.sign(np.take_along_axis(axes_KD, largest_K[:, None], axis=1)[:, 0])
    # A smaller singular value is rounding error, which the scaling would amplify.
    smallest = np.finfo(np.float64).eps * max(features_ND.shape) * np.linalg.norm(features_ND)
    projected_NK = np.where(singular_K > smallest, left_NK * (signs_K * singular_K), 0)[:, :3]
    return np.pad(projected_NK, ((0, 0), (0, 3 - projected_NK.shape[1])))
