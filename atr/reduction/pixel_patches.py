"""The patch of pixels that each token shows."""

from atr.reduction.base import EncoderOutput


def patch_size(encoded: EncoderOutput) -> tuple[int, int]:
    """Height and width of a token's patch in pixels.

    The encoder ignores the remaining pixels at the bottom and the right, which must be fewer than its rows
    and columns (384 pixels in 27 patches of 14 leave 6). Raises ValueError for fewer pixels than tokens.
    """
    (rows, columns), pixels_BCHW = encoded.require_grid(), encoded.require("pixels_BCHW")
    height, width = pixels_BCHW.shape[2:]
    if height < rows or width < columns:
        raise ValueError(
            f"pixels_BCHW: {height} x {width} pixels, allowed: at least {rows} x {columns} tokens"
        )
    return height // rows, width // columns
