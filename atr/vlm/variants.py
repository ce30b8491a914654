"""Ways in which a deployment differs from the reference: how images arrive, and how the tower computes.

The reference is the model's own processor (Pillow), its tower in float32 under sdpa, and original positions.
"""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy, deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from atr.core.layout import Positions
from atr.vlm.generation import Generator
from atr.vlm.inputs import Images, WholeInputs

BLOCK = 32
"""Weights that share a scale in GGUF's Q8_0 and Q4_0."""


@dataclass(frozen=True)
class Variant:
    """One difference from the reference; what is None stays as it is there."""

    image: Callable[[Image.Image], Image.Image] | None = None
    """What an image went through before the processor reads it."""
    processor: Callable[[Any], None] | None = None
    """Changes a copy of the image processor."""
    tower: Callable[[Any], None] | None = None
    """Changes a copy of the vision tower."""
    batch: int | None = None
    """Questions at a time."""
    positions: Positions | None = None
    """As in `atr.vlm.reduce.reduce`."""

    @property
    def is_of_images(self) -> bool:
        """Whether it is about the pixels that the tower is given."""
        return self.image is not None or self.processor is not None


@dataclass(frozen=True)
class _Changed:
    """Images that went through something."""

    images: Images
    change: Callable[[Image.Image], Image.Image]

    def image(self, name: str) -> Image.Image:
        return self.change(self.images.image(name))


@contextmanager
def deployed(answerer: Generator, variant: Variant) -> Iterator[Generator]:
    """The answerer as the variant deploys it; afterwards its model has its own tower again.

    Its source must be one that reads images.
    """
    source, model, processor = answerer.source, answerer.model, copy(answerer.processor)
    assert isinstance(source, WholeInputs), "stored features do not change"
    processor.image_processor = deepcopy(processor.image_processor)
    if variant.processor:
        variant.processor(processor.image_processor)
    images = _Changed(source.images, variant.image) if variant.image else source.images
    settings = replace(answerer.settings, positions=variant.positions or answerer.settings.positions)
    own = model.model.vision_tower
    if variant.tower:
        model.model.vision_tower = deepcopy(own)
        variant.tower(model.model.vision_tower)
    try:
        source = replace(source, processor=processor, images=images)
        yield replace(answerer, processor=processor, source=source, settings=settings)
    finally:
        model.model.vision_tower = own


def compressed(quality: int, image: Image.Image) -> Image.Image:
    """The image after JPEG of that quality, with the chroma subsampling that Pillow takes by default."""
    buffer = io.BytesIO()
    image.save(buffer, format="jpeg", quality=quality)
    with Image.open(buffer) as decoded:
        return decoded.convert("RGB")


def halved(image: Image.Image) -> Image.Image:
    """The image at half of its width and height, as a smaller copy of it would arrive."""
    size = max(1, image.width // 2), max(1, image.height // 2)
    return image.resize(size, Image.Resampling.BICUBIC)


def _bilinear(processor: Any) -> None:
    processor.resample = Image.Resampling.BILINEAR


def _torch_bicubic(antialias: bool, processor: Any) -> None:
    """Resize by torch's kernel, to the size that the processor's own resize gives, rounded to 8 bits."""
    own = processor.resize

    def resize(image: Any, *args: Any, **kwargs: Any) -> Any:
        target = own(image, *args, **kwargs)
        resized = _interpolated(torch.as_tensor(image), target.shape[-2:], antialias)
        return resized if isinstance(image, Tensor) else resized.numpy().astype(target.dtype)

    processor.resize = resize


def _interpolated(image_CHW: Tensor, size: tuple[int, int], antialias: bool) -> Tensor:
    resized_1CHW = F.interpolate(image_CHW[None].float(), size, mode="bicubic", antialias=antialias)
    return resized_1CHW[0].round().clamp(0, 255).to(image_CHW.dtype)


def _in_dtype(dtype: torch.dtype, tower: Any) -> None:
    tower.to(dtype)


def _autocast(tower: Any) -> None:
    tower.forward = torch.autocast(tower.device.type, torch.bfloat16)(tower.forward)


def _stored(tower: Any) -> None:
    """Give every layer's features as a store holds them."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        output.hidden_states = tuple(state_BTD.bfloat16() for state_BTD in output.hidden_states)
        return output

    tower.register_forward_hook(hook)


def _eager(tower: Any) -> None:
    tower.set_attn_implementation("eager")


def _quantise(through: Callable[[Tensor], Tensor], tower: Any) -> None:
    """Put the weights of linear layers through a quantisation, all whose inputs divide into its blocks."""
    for module in tower.modules():
        if isinstance(module, nn.Linear) and module.in_features % BLOCK == 0:
            blocks = module.weight.data.reshape(len(module.weight), -1, BLOCK)
            module.weight.data = through(blocks).flatten(1)


def q8_0(blocks: Tensor) -> Tensor:
    """Weights (..., BLOCK) as GGUF's Q8_0 restores them: 255 steps up to the largest, scale in float16."""
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    return (blocks / scale.clamp_min(torch.finfo(scale.dtype).tiny)).round() * scale.half().to(scale.dtype)


def q4_0(blocks: Tensor) -> Tensor:
    """Weights (..., BLOCK) as GGUF's Q4_0 restores them: 16 steps, the largest weight at -8, scale."""
    largest = blocks.take_along_dim(blocks.abs().argmax(-1, keepdim=True), -1)
    scale = largest / -8
    steps = torch.where(scale == 0, 0.0, blocks / scale)
    return (steps + 8.5).floor().clamp(0, 15).sub(8) * scale.half().to(scale.dtype)


VARIANTS = {
    "batch of one": Variant(batch=1),
    "eager attention": Variant(tower=_eager),
    "autocast bfloat16": Variant(tower=_autocast),
    "bfloat16 weights": Variant(tower=partial(_in_dtype, torch.bfloat16)),
    "float16 weights": Variant(tower=partial(_in_dtype, torch.float16)),
    "features stored in bfloat16": Variant(tower=_stored),
    "linear weights Q8_0": Variant(tower=partial(_quantise, q8_0)),
    "linear weights Q4_0": Variant(tower=partial(_quantise, q4_0)),
    "JPEG 95": Variant(image=partial(compressed, 95)),
    "JPEG 75": Variant(image=partial(compressed, 75)),
    "JPEG 50": Variant(image=partial(compressed, 50)),
    "resize by torch bicubic antialias": Variant(processor=partial(_torch_bicubic, True)),
    "resize by torch bicubic no antialias": Variant(processor=partial(_torch_bicubic, False)),
    "resize by Pillow bilinear": Variant(processor=_bilinear),
    "source at half size": Variant(image=halved),
    "contiguous positions": Variant(positions="contiguous"),
}
"""By the name that the report gives them."""
