"""Pictures of masks: the tokens that a selector keeps of an image."""

from collections.abc import Sequence

from PIL import Image
from torch import Tensor

SIDE = 216
"""Approximate length of an image's longer side in pixels."""
GREY = (128, 128, 128)


def mask_picture(masked: Sequence[tuple[Image.Image, Tensor]]) -> Image.Image:
    """Each image above its kept patches, the dropped ones in grey; one column per image.

    `masked` are images with their mask_RC of tokens, which may have grids of their own.
    """
    shown = [(_resized(image, mask_RC), mask_RC) for image, mask_RC in masked]
    height = max(image.height for image, _ in shown)
    picture = Image.new("RGB", (sum(image.width for image, _ in shown), 2 * height))
    left = 0
    for image, mask_RC in shown:
        picture.paste(image, (left, 0))
        picture.paste(_grey_out(image, mask_RC), (left, height))
        left += image.width
    return picture


def _resized(image: Image.Image, mask_RC: Tensor) -> Image.Image:
    rows, columns = mask_RC.shape
    cell = max(1, SIDE // max(rows, columns))
    return image.convert("RGB").resize((columns * cell, rows * cell))


def _grey_out(image: Image.Image, mask_RC: Tensor) -> Image.Image:
    kept = Image.fromarray((mask_RC.bool().numpy() * 255).astype("uint8")).resize(
        image.size, Image.Resampling.NEAREST
    )
    faded = Image.blend(image, Image.new("RGB", image.size, GREY), 0.9)
    return Image.composite(image, faded, kept)
