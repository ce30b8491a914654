"""Decodes image files of any format to RGB."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_WHITE = (255, 255, 255)


def decode(content: bytes | Path, name: str) -> Image.Image:
    """Decode the first frame of an image to RGB with 8 bits per channel, as a viewer shows it.

    Transparent pixels are composed with white, 16-bit grey keeps its upper byte, CMYK is converted. EXIF
    rotation is ignored, as in lmms-eval. Raises ValueError with `name` for a file that is not an image or is
    truncated, for more pixels than Pillow allows (a decompression bomb), and for 32-bit grey, whose white
    level is unknown.
    """
    try:
        with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as image:
            image.load()
            return _rgb(image)
    except Exception as error:  # a decoder may raise any exception on a broken file
        raise ValueError(f"{name} cannot be read as an image: {error or type(error).__name__}") from error


def read_size(content: bytes, name: str) -> tuple[int, int]:
    """(width, height) of an image file, of which only the head is read; raises ValueError with `name`."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            return image.size
    except Exception as error:  # as in `decode`
        raise ValueError(f"{name} cannot be read as an image: {error or type(error).__name__}") from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return _from_16_bits(np.asarray(image))
    if image.mode == "I":
        # Pillow opens 16-bit grey of some formats in this mode, and its own conversion clips it to white.
        values = np.asarray(image)
        if values.min() >= 0 and values.max() < 2**16:
            return _from_16_bits(values)
    if image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode} (32-bit grey) is not allowed, allowed: 8 or 16 bits per channel")
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, _WHITE), layer).convert("RGB")


def _from_16_bits(values: NDArray[Any]) -> Image.Image:
    return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
