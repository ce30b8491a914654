"""Features as colours: what an encoder tells apart in a picture, made visible."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from atr.features.encoder import Encoder

_Floats = NDArray[np.floating[Any]]

PICTURE_SIDE = 384  # pixels of the longer side of one picture, about


@torch.inference_mode()
def pca_picture(encoder: Encoder, images: Sequence[Image.Image]) -> bytes:
    """PNG of the images in a row, each followed by its patches in the `colours` of their features.

    Of each image the middle is taken that has the shape of the encoder's grid. The encoder must be as it was
    loaded, in float32 on the CPU: so the bytes do not depend on accelerator and precision of an extraction.
    """
    rows, columns = encoder.grid
    cell = max(1, PICTURE_SIDE // max(encoder.grid))
    width, height = columns * cell, rows * cell
    fitted = [ImageOps.fit(image.convert("RGB"), (width, height)) for image in images]
    features_BND = encoder(encoder.preprocess(fitted)).numpy()
    picture = Image.new("RGB", (2 * width * len(fitted), height))
    for place, (image, features_ND) in enumerate(zip(fitted, features_BND, strict=True)):
        patches_RC3 = np.rint(255 * pca_colours(features_ND.reshape(rows, columns, -1))).astype(np.uint8)
        patches = Image.fromarray(patches_RC3).resize(image.size, Image.Resampling.NEAREST)
        picture.paste(image, (2 * place * width, 0))
        picture.paste(patches, ((2 * place + 1) * width, 0))
    buffer = io.BytesIO()
    picture.save(buffer, format="png")
    return buffer.getvalue()


def pca_colours(features_RCD: _Floats) -> _Floats:
    """RGB in 0..1 of each patch (R rows, C columns): the first three principal components of its features.

    The components are those of this picture alone, and each spreads over its colour from the 1st to the 99th
    percentile; one that there is not, for want of patches or channels, leaves its colour at 0.
    """
    rows, columns, width = features_RCD.shape
    features_ND = features_RCD.reshape(-1, width).astype(np.float64)
    centred_ND = features_ND - features_ND.mean(0)
    _, values_K, directions_KD = np.linalg.svd(centred_ND, full_matrices=False)
    # What is smaller is rounding of the mean, which the spreading would blow up.
    smallest = np.finfo(np.float64).eps * max(features_ND.shape) * np.linalg.norm(features_ND)
    found_KD = directions_KD[:3][values_K[:3] > smallest]
    directions_3D = np.zeros((3, width))
    directions_3D[: len(found_KD)] = found_KD
    # The sign of a component is arbitrary: the largest weight is made positive, so equal data look equal.
    largest = np.abs(directions_3D).argmax(1, keepdims=True)
    directions_3D *= np.sign(np.take_along_axis(directions_3D, largest, axis=1))
    components_N3 = centred_ND @ directions_3D.T
    low, high = np.percentile(components_N3, [1, 99], axis=0)
    span = np.where(high > low, high - low, 1.0)
    colours_N3: _Floats = ((components_N3 - low) / span).clip(0, 1)
    return colours_N3.reshape(rows, columns, 3)
