"""Features as colours: what an encoder tells apart in a picture, made visible."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]


def colours(features_RCD: Floats) -> Floats:
    """RGB in 0..1 of each patch (R rows, C columns): the first three principal components of its features.

    The components are those of this picture alone, and each spreads over its colour from the 1st to the 99th
    percentile. Raises ValueError for fewer than three patches or channels.
    """
    rows, columns, width = features_RCD.shape
    if min(rows * columns, width) < 3:
        raise ValueError(f"features {rows} x {columns} x {width} have no three components")
    features_ND = features_RCD.reshape(-1, width).astype(np.float64)
    centred_ND = features_ND - features_ND.mean(0)
    directions_3D = np.linalg.svd(centred_ND, full_matrices=False)[2][:3]
    # The sign of a component is arbitrary: the largest weight is made positive, so equal data look equal.
    largest = np.abs(directions_3D).argmax(1, keepdims=True)
    directions_3D *= np.sign(np.take_along_axis(directions_3D, largest, axis=1))
    components_N3 = centred_ND @ directions_3D.T
    low, high = np.percentile(components_N3, [1, 99], axis=0)
    span = np.where(high > low, high - low, 1.0)
    colours_N3: Floats = ((components_N3 - low) / span).clip(0, 1)
    return colours_N3.reshape(rows, columns, 3)
