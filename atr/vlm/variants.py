"""Deployments that differ from the reference: image compression and resizing, precision, kernels, positions.

The reference has the model's own processor (Pillow), the vision tower in float32 under sdpa, and original
positions.
"""

import hashlib
import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy, deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from atr.core.layout import Positions
from atr.features.merged import vision_tower
from atr.vlm.compatibility import is_ruled
from atr.vlm.encoded_tiles import EncodedTiles
from atr.vlm.families.tower import project
from atr.vlm.generation import Generator, QuestionBatch
from atr.vlm.inputs import ImageInputs, ImagesByName
from atr.vlm.reduce import Prepared

BLOCK = 32
"""Number of weights that share a scale in GGUF's Q8_0 and Q4_0."""


@dataclass(frozen=True)
class Variant:
    """One difference from the reference deployment; a field of None changes nothing."""

    image: Callable[[Image.Image], Image.Image] | None = None
    """Changes an image before the processor reads it."""
    processor: Callable[[Any], None] | None = None
    """Changes a copy of the image processor in place."""
    tower: Callable[[Any], None] | None = None
    """Changes a copy of the vision tower in place."""
    batch_tokens: int | None = None
    """Tokens per batch, which has at least one question."""
    features: Callable[[Tensor], Tensor] | None = None
    """Changes the tower's features_BND."""
    positions: Positions | None = None
    """As in `atr.vlm.reduce.reduce`."""

    @property
    def is_of_images(self) -> bool:
        """Whether it changes the pixels that the tower reads."""
        return self.image is not None or self.processor is not None

    @property
    def encodes(self) -> bool:
        """Whether its images must be encoded anew, because pixels, tower or batches differ."""
        return self.is_of_images or self.tower is not None or self.batch_tokens is not None


@dataclass(frozen=True)
class _ChangedImages:
    """Images to which a change is applied when they are read."""

    images: ImagesByName
    change: Callable[[Image.Image], Image.Image]

    def image(self, name: str) -> Image.Image:
        return self.change(self.images.image(name))


@contextmanager
def deploy(generator: Generator, variant: Variant) -> Iterator[Generator]:
    """A generator in the variant's deployment; on exit the model has its own tower again.

    The generator must read images, not stored features. A change of `features` or `positions` is left to
    `after_encoding`.
    """
    source, model, processor = generator.source, generator.model, copy(generator.processor)
    assert isinstance(source, ImageInputs), "a variant applies to images, not to stored features"
    processor.image_processor = deepcopy(processor.image_processor)
    if variant.processor:
        variant.processor(processor.image_processor)
    images = _ChangedImages(source.images, variant.image) if variant.image else source.images
    own = vision_tower(model)
    (place,) = (name for name, module in model.base_model.named_children() if module is own)
    if variant.tower:
        setattr(model.base_model, place, _changed(model, own, variant.tower))
    try:
        source = replace(source, processor=processor, images=images)
        yield replace(generator, processor=processor, source=source)
    finally:
        setattr(model.base_model, place, own)


def _changed(model: Any, own: Any, change: Callable[[Any], None]) -> Any:
    """A copy of the tower, changed; in families of the rule its output has the precision of the own one.

    There the model's own projector follows, and some of them do not cast; `project` does so for a LLaVA.
    """
    tower = deepcopy(own)
    change(tower)
    if is_ruled(model):
        tower.register_forward_hook(lambda module, args, output: _cast(output, own.dtype))
    return tower


def _cast(values: Any, dtype: torch.dtype) -> Any:
    """All floating tensors of an output in one dtype."""
    if isinstance(values, Tensor):
        return values.to(dtype) if values.is_floating_point() else values
    if isinstance(values, Mapping):
        return type(values)(**{name: _cast(value, dtype) for name, value in values.items()})
    return (
        type(values)(_cast(value, dtype) for value in values) if isinstance(values, list | tuple) else values
    )


def after_encoding(
    generator: Generator, batch: QuestionBatch, variant: Variant
) -> tuple[Generator, QuestionBatch]:
    """Generator and encoded batch with the variant's `positions` and `features`; the tower does not run."""
    if variant.positions:
        generator = replace(generator, settings=replace(generator.settings, positions=variant.positions))
    if variant.features and batch.whole and is_ruled(batch.whole.model):
        batch = replace(batch, whole=_change_tokens(batch.whole, variant.features))
    elif variant.features and (whole := batch.whole):
        change, encoded = variant.features, whole.encoded.whole
        features_BND = change(encoded.features_BND)
        encoded = replace(
            encoded,
            features_BND=features_BND,
            projected_BND=project(whole.model, features_BND),
            encode=_then(change, encoded.encode),
        )
        tiles = EncodedTiles.of_one_grid(encoded)
        batch = replace(batch, whole=replace(whole, encoded=tiles, tokens=whole.layout.tokens(tiles)))
    return generator, batch


def _change_tokens(whole: Prepared, change: Callable[[Tensor], Tensor]) -> Prepared:
    """Merged tokens changed both for the reducers and for the language model, which is fed them."""
    groups = [
        replace(
            group,
            features_BND=change(group.features_BND),
            projected_BND=change(group.require("projected_BND")),
        )
        for group in whole.encoded.groups
    ]
    levels = [[change(tokens_PD) for tokens_PD in level] for level in whole.tokens.levels]
    tokens = replace(whole.tokens, images=list(map(change, whole.tokens.images)), levels=levels)
    return replace(whole, encoded=replace(whole.encoded, groups=tuple(groups)), tokens=tokens)


def _then(change: Callable[[Tensor], Tensor], encode: Callable[[Tensor], Tensor] | None) -> Any:
    """The encoder that a reducer may be given, with its features changed; None if there is none."""
    return encode and (lambda pixels_BCHW: change(encode(pixels_BCHW)))


def pixel_digest(generator: Generator, image: str) -> bytes:
    """SHA-256 of the values that the generator's processor makes of one image."""
    assert isinstance(generator.source, ImageInputs)
    picture = generator.source.images.image(image)
    values = generator.processor.image_processor([picture], return_tensors="np")["pixel_values"]
    return hashlib.sha256(np.asarray(values).tobytes()).digest()


def compress_jpeg(quality: int, image: Image.Image) -> Image.Image:
    """Compress an image to JPEG and decode it, with Pillow's default chroma subsampling."""
    buffer = io.BytesIO()
    image.save(buffer, format="jpeg", quality=quality)
    with Image.open(buffer) as decoded:
        return decoded.convert("RGB")


def halve(image: Image.Image) -> Image.Image:
    """Resize an image to half its width and height."""
    size = max(1, image.width // 2), max(1, image.height // 2)
    return image.resize(size, Image.Resampling.BICUBIC)


def _resize_bilinear(processor: Any) -> None:
    processor.resample = Image.Resampling.BILINEAR


def _resize_bicubic(antialias: bool, processor: Any) -> None:
    """Resize with torch's kernel to the size of the processor's own resize, rounded to 8 bits."""
    own = processor.resize

    def resize(image: Any, *args: Any, **kwargs: Any) -> Any:
        target = own(image, *args, **kwargs)
        resized = _interpolate(torch.as_tensor(image), target.shape[-2:], antialias)
        return resized if isinstance(image, Tensor) else resized.numpy().astype(target.dtype)

    processor.resize = resize


def _interpolate(image_CHW: Tensor, size: tuple[int, int], antialias: bool) -> Tensor:
    resized_1CHW = F.interpolate(image_CHW[None].float(), size, mode="bicubic", antialias=antialias)
    return resized_1CHW[0].round().clamp(0, 255).to(image_CHW.dtype)


def _use_bfloat16(tower: Any) -> None:
    tower.bfloat16()


def _use_float16(tower: Any) -> None:
    """Round weights and results to float16; on a CPU products are summed in float32, as a GPU sums them.

    Most CPUs have no instructions for float16, and torch's own products take six times as long there.
    """
    tower.half()
    if tower.device.type == "cpu":
        for module in tower.modules():
            if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d):
                _sum_in_float32(module)


def _sum_in_float32(module: nn.Module) -> None:
    wide = deepcopy(module).float()
    module.forward = lambda values: wide(values.float()).half()


def _autocast(tower: Any) -> None:
    tower.forward = torch.autocast(tower.device.type, torch.bfloat16)(tower.forward)


def _round(features_BND: Tensor) -> Tensor:
    """Round features to bfloat16, as a feature store does."""
    return features_BND.bfloat16()


def _use_eager(tower: Any) -> None:
    tower.set_attn_implementation("eager")


def _quantise(restore: Callable[[Tensor], Tensor], tower: Any) -> None:
    """Quantise and restore the weights of linear layers whose input width is a multiple of BLOCK."""
    for module in tower.modules():
        if isinstance(module, nn.Linear) and module.in_features % BLOCK == 0:
            blocks = module.weight.data.reshape(len(module.weight), -1, BLOCK)
            module.weight.data = restore(blocks).flatten(1)


def q8_0(blocks: Tensor) -> Tensor:
    """Quantise weights (..., BLOCK) to GGUF's Q8_0 and restore them: 255 levels, scale in float16."""
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    return (blocks / scale.clamp_min(torch.finfo(scale.dtype).tiny)).round() * scale.half().to(scale.dtype)


def q4_0(blocks: Tensor) -> Tensor:
    """Quantise weights (..., BLOCK) to GGUF's Q4_0 and restore them: 16 levels, the largest at -8."""
    largest = blocks.take_along_dim(blocks.abs().argmax(-1, keepdim=True), -1)
    scale = largest / -8
    steps = torch.where(scale == 0, 0.0, blocks / scale)
    return (steps + 8.5).floor().clamp(0, 15).sub(8) * scale.half().to(scale.dtype)


VARIANTS = {
    "batch of one": Variant(batch_tokens=1),
    "eager attention": Variant(tower=_use_eager),
    "autocast bfloat16": Variant(tower=_autocast),
    "bfloat16 weights": Variant(tower=_use_bfloat16),
    "float16 weights": Variant(tower=_use_float16),
    "features stored in bfloat16": Variant(features=_round),
    "linear weights Q8_0": Variant(tower=partial(_quantise, q8_0)),
    "linear weights Q4_0": Variant(tower=partial(_quantise, q4_0)),
    "JPEG 95": Variant(image=partial(compress_jpeg, 95)),
    "JPEG 75": Variant(image=partial(compress_jpeg, 75)),
    "JPEG 50": Variant(image=partial(compress_jpeg, 50)),
    "resize by torch bicubic antialias": Variant(processor=partial(_resize_bicubic, True)),
    "resize by torch bicubic no antialias": Variant(processor=partial(_resize_bicubic, False)),
    "resize by Pillow bilinear": Variant(processor=_resize_bilinear),
    "source at half size": Variant(image=halve),
    "contiguous positions": Variant(positions="contiguous"),
}
"""Variants by their names in the report."""
