"""Picture files of any kind into RGB, or an error that names the file."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

WHITE = (255, 255, 255)


def decode(content: bytes | Path, name: str) -> Image.Image:
    """The first frame of a picture as RGB with 8 bits a channel, as a viewer shows it; any size from 1x1.

    What is transparent lies on white, 16-bit grey keeps its upper byte, CMYK is converted; EXIF rotation is
    left alone, as the benchmarks' toolkit does. Raises ValueError with `name` for a file that is no picture
    or is cut off, for one of more pixels than Pillow takes (a decompression bomb), and for 32-bit grey, which
    has no white.
    """
    try:
        with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as image:
            image.load()
            return _rgb(image)
    except Exception as error:  # a decoder may raise anything on a broken file, and all of it means the same
        raise ValueError(f"{name} cannot be read as an image: {error or type(error).__name__}") from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return _of_16_bits(np.asarray(image))
    if image.mode == "I":
        # How 16-bit grey is read from some formats; Pillow's own conversion clips it to white.
        values = np.asarray(image)
        if values.min() >= 0 and values.max() < 2**16:
            return _of_16_bits(values)
    if image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode} (32-bit grey) is not allowed, 8 and 16 bits a channel are")
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, WHITE), layer).convert("RGB")


def _of_16_bits(values: NDArray[Any]) -> Image.Image:
    return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
