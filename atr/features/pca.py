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
from sklearn.decomposition import PCA

from atr.features.encoder import Encoder

PICTURE_SIDE = 384
"""Approximate length in pixels of the longer side of one picture."""

_Floats = NDArray[np.floating[Any]]


@torch.inference_mode()
def pca_picture(encoder: Encoder, images: Sequence[Image.Image]) -> bytes:
    """PNG of the images in a row, each followed by its patches in their `pca_colours`.

    Images are cropped around their centre to the shape of the encoder's grid. The encoder must be on the CPU
    in float32, as loaded, so that the bytes do not depend on the device and precision of an extraction.
    """
    rows, columns = encoder.grid
    cell = max(1, PICTURE_SIDE // max(encoder.grid))
    width, height = columns * cell, rows * cell
    cropped = [ImageOps.fit(image.convert("RGB"), (width, height)) for image in images]
    features_BND = encoder(encoder.preprocess(cropped)).numpy()
    picture = Image.new("RGB", (2 * width * len(cropped), height))
    for place, (image, features_ND) in enumerate(zip(cropped, features_BND, strict=True)):
        patches_RC3 = np.rint(255 * pca_colours(features_ND.reshape(rows, columns, -1))).astype(np.uint8)
        patches = Image.fromarray(patches_RC3).resize(image.size, Image.Resampling.NEAREST)
        picture.paste(image, (2 * place * width, 0))
        picture.paste(patches, ((2 * place + 1) * width, 0))
    buffer = io.BytesIO()
    picture.save(buffer, format="png")
    return buffer.getvalue()


def pca_colours(features_RCD: _Floats) -> _Floats:
    """RGB in 0..1 of each patch: the first three principal components of one image's features; (R, C, 3).

    Each component is scaled so that its 1st and 99th percentiles become 0 and 1. A component that does not
    exist, as there are too few patches or channels, is 0.
    """
    rows, columns, width = features_RCD.shape
    features_ND = features_RCD.reshape(-1, width).astype(np.float64)
    pca = PCA(min(3, *features_ND.shape), svd_solver="full")
    with np.errstate(divide="ignore", invalid="ignore"):  # explained variance of constant features
        components_NK = pca.fit_transform(features_ND)
    # A smaller singular value is rounding error, which the scaling would amplify.
    smallest = np.finfo(np.float64).eps * max(features_ND.shape) * np.linalg.norm(features_ND)
    components_N3 = np.zeros((len(features_ND), 3))
    components_N3[:, : pca.n_components_] = np.where(pca.singular_values_ > smallest, components_NK, 0)
    low, high = np.percentile(components_N3, [1, 99], axis=0)
    span = np.where(high > low, high - low, 1.0)
    colours_N3: _Floats = ((components_N3 - low) / span).clip(0, 1)
    return colours_N3.reshape(rows, columns, 3)
