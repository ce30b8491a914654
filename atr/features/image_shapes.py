"""Images of shapes that an image processor refuses: named, and before hours are spent on the others."""

from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image

Preprocess = Callable[[Sequence[Image.Image]], Any]
Size = tuple[int, int]
"""(width, height) in pixels."""

_EXTREMES: tuple[Callable[[Size], float], ...] = (
    lambda size: size[0] / size[1],
    lambda size: size[1] / size[0],
    lambda size: -min(size),
    lambda size: -size[0] * size[1],
)
"""Widest, tallest, narrowest and smallest: a processor that takes the image with the most takes all."""


def check_shapes(preprocess: Preprocess, ids: Sequence[str], sizes: Sequence[Size]) -> None:
    """Raise ValueError naming an image if `preprocess` refuses the most extreme of these sizes."""
    places = {max(range(len(sizes)), key=lambda place: extreme(sizes[place])) for extreme in _EXTREMES}
    for place in sorted(places):
        preprocess_named(preprocess, [ids[place]], [Image.new("RGB", sizes[place])])


def preprocess_named(preprocess: Preprocess, ids: Sequence[str], images: Sequence[Image.Image]) -> Any:
    """What `preprocess` gives; a ValueError of it names the image."""
    try:
        return preprocess(images)
    except ValueError as error:
        if len(images) == 1:
            width, height = images[0].size
            raise ValueError(f"image {ids[0]}: {width} x {height} pixels: {error}") from error
        for name, image in zip(ids, images, strict=True):
            preprocess_named(preprocess, [name], [image])
        raise  # of no single image
