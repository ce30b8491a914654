"""Pictures of masks: the tokens that a selector keeps of an image."""

from collections.abc import Sequence

from PIL import Image
from torch import Tensor

SIDE = 216
"""Approximate length of an image's longer side in pixels."""
GREY = (128, 128, 128)


def mask_picture(images: Sequence[Image.Image], mask_BN: Tensor, grid: tuple[int, int]) -> Image.Image:
    """Each image above its kept patches, the dropped ones in grey; one column per image."""
    rows, columns = grid
    cell = max(1, SIDE // max(grid))
    width, height = columns * cell, rows * cell
    picture = Image.new("RGB", (width * len(images), 2 * height))
    for place, (image, mask_N) in enumerate(zip(images, mask_BN, strict=True)):
        image = image.convert("RGB").resize((width, height))
        picture.paste(image, (place * width, 0))
        picture.paste(_grey_out(image, mask_N.reshape(rows, columns)), (place * width, height))
    return picture


def _grey_out(image: Image.Image, mask_RC: Tensor) -> Image.Image:
    kept = Image.fromarray((mask_RC.bool().numpy() * 255).astype("uint8")).resize(
        image.size, Image.Resampling.NEAREST
    )
    faded = Image.blend(image, Image.new("RGB", image.size, GREY), 0.9)
    return Image.composite(image, faded, kept)
