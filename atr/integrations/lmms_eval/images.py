"""What lmms-eval's classes do to an image before the processor gets it."""

import io
import math
from dataclasses import dataclass
from typing import Self

from PIL import Image

MAX_ASPECT = 200
"""qwen-vl-utils refuses images that are more times as long as they are wide."""
_JPEG_QUALITY = 85


@dataclass(frozen=True)
class Rounding:
    """Sides of images become multiples of `multiple`, their product `low` to `high` pixels: qwen-vl-utils."""

    multiple: int
    low: int
    high: int

    @classmethod
    def of(cls, multiple: int) -> Self:
        """With the bounds of qwen-vl-utils where it is given none: 4 and 16,384 tokens."""
        return cls(multiple, 4 * multiple**2, 16384 * multiple**2)

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height of the resized image, of about the same shape.

        Raises ValueError for an image that is more than 200 times as long as it is wide.
        """
        if max(width, height) > MAX_ASPECT * min(width, height):
            raise ValueError(f"image: {width} x {height} is too long, allowed: an aspect up to {MAX_ASPECT}")
        rounded = [
            max(self.multiple, round(side / self.multiple) * self.multiple) for side in (width, height)
        ]
        if rounded[0] * rounded[1] > self.high:
            scale = math.sqrt(width * height / self.high)
            lower = [math.floor(side / scale / self.multiple) for side in (width, height)]
            rounded = [max(1, count) * self.multiple for count in lower]
        elif rounded[0] * rounded[1] < self.low:
            scale = math.sqrt(self.low / (width * height))
            rounded = [math.ceil(side * scale / self.multiple) * self.multiple for side in (width, height)]
        return rounded[0], rounded[1]

    def resize(self, image: Image.Image) -> Image.Image:
        """The image in RGB at its new size; transparent pixels are composed with white."""
        if image.mode == "RGBA":
            opaque = Image.new("RGB", image.size, (255, 255, 255))
            opaque.paste(image, mask=image.getchannel("A"))
            image = opaque
        return image.convert("RGB").resize(self.size(*image.size))


def pass_through_jpeg(image: Image.Image) -> Image.Image:
    """The image as JPEG of quality 85 leaves it."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="JPEG", quality=_JPEG_QUALITY)
    return Image.open(buffer)
