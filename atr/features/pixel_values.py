"""Pixel values of images, bit for bit those of a transformers image processor, in a tenth of its time.

Shapes: see atr.core.tokens; C channels, V values of a pixel.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import BatchFeature
from transformers.image_processing_backends import PilBackend

from atr.features.preprocess import probe_image

_VALUES = 256
_GEOMETRY = {"do_rescale": False, "do_normalize": False}
"""Settings of a processor that leave pixels 8-bit."""
_ARITHMETIC = {"do_resize": False, "do_center_crop": False, "do_pad": False}
"""Settings of a processor that leave pixels in their places."""


class Preprocessor:
    """Turns PIL images into pixel_values_BCHW as `processor` does.

    Rescaling and normalising map each 8-bit value of a channel to one number, so a table of the processor's
    own results replaces them, and images of the size that it leaves unchanged do not pass through it at all.
    A processor with steps of its own, or an image that is not RGB, is left to the processor. May be called
    from several threads.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self._table_CV = _value_table(processor)
        self._unchanged = _unchanged_size(processor) if self._table_CV is not None else None

    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        """pixel_values_BCHW; raises ValueError for a processor that cuts images into tiles."""
        if self._table_CV is None or any(image.mode != "RGB" for image in images):
            return self._processed(images)
        if all(image.size == self._unchanged for image in images):
            pixels = [_channels_first(image) for image in images]
        else:
            pixels = self.processor(list(images), **_GEOMETRY)["pixel_values"]
        values_BCHW = np.empty((len(pixels), *pixels[0].shape), self._table_CV.dtype)
        for values_CHW, pixels_CHW in zip(values_BCHW, pixels, strict=True):
            for values_HW, table_V, pixels_HW in zip(values_CHW, self._table_CV, pixels_CHW, strict=True):
                # Every 8-bit value is in the table: "clip" only skips the check, and the copy it needs.
                np.take(table_V, pixels_HW, out=values_HW, mode="clip")
        return torch.from_numpy(values_BCHW)

    def _processed(self, images: Sequence[Image.Image]) -> Tensor:
        pixel_values_BCHW: Tensor = self.processor(list(images), return_tensors="pt")["pixel_values"]
        if pixel_values_BCHW.ndim == 5:  # (rows of a batch, tiles, ...)
            pixel_values_BCHW = pixel_values_BCHW.flatten(0, 1)
        if len(pixel_values_BCHW) != len(images):
            name = type(self.processor).__name__
            raise ValueError(f"{name} cuts images into tiles, allowed: a vision tower's own")
        return pixel_values_BCHW


class NativePreprocessor:
    """Turns PIL images into the tensors of `processor`, whose images have grids of their own.

    May be called from several threads.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, images: Sequence[Image.Image]) -> BatchFeature:
        """The tensors by name, as the vision tower takes them."""
        inputs: BatchFeature = self.processor(list(images), return_tensors="pt")
        inputs.pop("num_soft_tokens_per_image", None)  # for the text
        return inputs


def _channels_first(image: Image.Image) -> NDArray[np.uint8]:
    return np.asarray(image).transpose(2, 0, 1)


def _value_table(processor: Any) -> NDArray[Any] | None:
    """What each 8-bit value of each channel becomes, (C, V); None if the processor has steps of its own."""
    if getattr(type(processor), "_preprocess", None) is not PilBackend._preprocess:
        return None
    values_HW = np.arange(_VALUES, dtype=np.uint8).reshape(16, 16)
    image = Image.fromarray(np.stack([values_HW] * 3, axis=-1))
    values_BCHW = processor([image], **_ARITHMETIC, return_tensors="np")["pixel_values"]
    table_CV: NDArray[Any] = values_BCHW.reshape(-1, _VALUES)
    return table_CV


def _unchanged_size(processor: Any) -> tuple[int, int] | None:
    """(width, height) of the images whose pixels the processor leaves in their places; None if there is none.

    Resizing and cropping are linear in the pixels: if they leave the probe image as it is, they do so with
    every image of its size.
    """
    height, width = _geometry(processor, probe_image(64, 64)).shape[1:]
    probe = probe_image(width, height)
    return (width, height) if np.array_equal(_geometry(processor, probe), _channels_first(probe)) else None


def _geometry(processor: Any, image: Image.Image) -> NDArray[np.uint8]:
    pixels_CHW: NDArray[np.uint8] = processor([image], **_GEOMETRY)["pixel_values"][0]
    return pixels_CHW
