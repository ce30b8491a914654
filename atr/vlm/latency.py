"""Milliseconds per image of a selection and of the language model's prefill.

The images are noise: the time of towers and language models does not depend on pixel values. Those of a LLaVA
are one tile each. Those of another family are pictures of one size, which the processor resizes or cuts as it
would any other, so that their number of tokens is the family's own.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from atr.core.timing import milliseconds
from atr.core.tokens import budget
from atr.features.attention_hooks import CAPTURABLE
from atr.reduction import EncoderOutput, Merger, Reducer
from atr.reduction.checked import select, select_merged
from atr.vlm.compatibility import is_ruled
from atr.vlm.families import Layer, Tiling, family_of
from atr.vlm.families.tower import encode_tiles, token_grid
from atr.vlm.inputs import Prompts
from atr.vlm.policy import Policy
from atr.vlm.processors import read_images
from atr.vlm.reduce import Prepared, prepare
from atr.vlm.tiling import TileLayout

PICTURE = (1024, 768)
"""Width and height in pixels of a picture of noise."""
_QUESTION = "Describe the image in detail."


class NoiseImages(Protocol):
    """A batch of `count` images of noise, each of `tokens` visual tokens."""

    @property
    def count(self) -> int:
        """Images of the batch."""

    @property
    def tokens(self) -> int:
        """Visual tokens of an image."""

    @property
    def is_cut(self) -> bool:
        """Whether an image is cut into tiles."""

    def encode(self, needs: Collection[str], layer: Layer) -> Any:
        """Encode the images with the fields in `needs`, read at a layer."""

    def select(self, reducer: Reducer, encoded: Any, fraction: float) -> object:
        """Select the fraction of the tokens of each image, and merge them if the reducer does."""


@dataclass(frozen=True)
class NoiseTiles:
    """Tiles of noise for a LLaVA; the mean token of an image stands in for its question."""

    model: Any
    pixels_BCHW: Tensor
    is_cut = False

    @property
    def count(self) -> int:
        """Tiles of the batch."""
        return len(self.pixels_BCHW)

    @property
    def tokens(self) -> int:
        """Tokens of a tile."""
        rows, columns = token_grid(self.model, self.pixels_BCHW)
        return rows * columns

    def encode(self, needs: Collection[str] = (), layer: Layer = None) -> EncoderOutput:
        """The features of each tile, those that the model reads."""
        tiling = Tiling.of_one_grid((1,) * self.count, token_grid(self.model, self.pixels_BCHW))
        images = encode_tiles(self.model, {"pixel_values": self.pixels_BCHW}, tiling, needs)
        assert images.projected_BND is not None
        return replace(images, text_BD=F.normalize(images.projected_BND.float().mean(1), dim=-1))

    def select(self, reducer: Reducer, encoded: EncoderOutput, fraction: float) -> object:
        """As `NoiseImages.select`."""
        return _select(reducer, encoded, budget(fraction, encoded.tokens))


@dataclass(frozen=True)
class NoisePictures:
    """Pictures of noise in the processor's output, each in a prompt."""

    model: Any
    inputs: Mapping[str, Any]

    @property
    def count(self) -> int:
        """Pictures of the batch."""
        return len(self._layout.sizes)

    @property
    def tokens(self) -> int:
        """Visual tokens of a picture, all tiles together."""
        return self._layout.sizes[0]

    @property
    def is_cut(self) -> bool:
        """Whether a picture has several tiles."""
        return max(self._layout.tiling.tiles) > 1

    @cached_property
    def _layout(self) -> TileLayout:
        return TileLayout(self.model, family_of(self.model).tiling(self.model, self.inputs))

    def encode(self, needs: Collection[str] = (), layer: Layer = None) -> Prepared:
        """The pictures as for answers to their prompts."""
        return prepare(self.model, self.inputs, needs=needs, layer=layer)

    def select(self, reducer: Reducer, encoded: Prepared, fraction: float) -> object:
        """As `NoiseImages.select`."""
        groups = encoded.encoded.groups
        if isinstance(reducer, Merger):
            return [_select(reducer, group, budget(fraction, group.tokens)) for group in groups]
        tiles = replace(encoded.encoded, groups=tuple(map(replace, groups)))  # copies, as in _select
        return replace(encoded, encoded=tiles).choose(reducer, Policy(fraction))


def make_noise(model: Any, processor: Any, images: int, seed: int) -> NoiseImages:
    """A batch of images of noise, in the shape that the model's family reads; on the model's device."""
    if not is_ruled(model):
        vision = model.config.vision_config
        size = (images, vision.num_channels, vision.image_size, vision.image_size)
        pixels_BCHW = torch.randn(size, generator=torch.Generator().manual_seed(seed))
        return NoiseTiles(model, pixels_BCHW.to(model.device))
    pixels = np.random.default_rng(seed).integers(0, 256, (images, *reversed(PICTURE), 3), dtype=np.uint8)
    prompts = Prompts(processor)
    texts = [prompts.text(_QUESTION, 1)] * images
    pictures = [[Image.fromarray(image)] for image in pixels]
    inputs, _ = read_images(processor, pictures, texts, **prompts.options(texts))
    return NoisePictures(model, inputs.to(model.device))


@torch.inference_mode()
def time_selection(
    images: NoiseImages, reducer: Reducer, kept: Sequence[float], seconds: float, layer: Layer = None
) -> Iterator[dict[str, Any]]:
    """Time of a selection at each fraction of `kept`, including the attention and keys that it needs.

    Their time is that of the tower's forward with them minus that without. Each time is measured for at least
    `seconds`. `layer` is what the reducer reads of the images.
    """
    encoded, extra = images.encode(reducer.needs, layer), 0.0
    if observed := reducer.needs & set(CAPTURABLE):
        plain, observing = (
            milliseconds(partial(images.encode, needs, layer), seconds)
            for needs in (frozenset[str](), observed)
        )
        extra = max(0.0, observing - plain)
    for fraction in kept:
        spent = milliseconds(partial(images.select, reducer, encoded, fraction), seconds)
        yield {
            "tokens": images.tokens,
            "kept": budget(fraction, images.tokens),
            "batch": images.count,
            "milliseconds": (spent + extra) / images.count,
        }


def _select(reducer: Reducer, encoded: EncoderOutput, count: int) -> object:
    # A copy, because a reducer may cache the scores of the last object it was given.
    encoded = replace(encoded)
    return (
        select_merged(reducer, encoded, count)
        if isinstance(reducer, Merger)
        else select(reducer, encoded, count)
    )


@torch.inference_mode()
def time_prefill(model: Any, tokens: int, images: int, seconds: float) -> dict[str, Any]:
    """Time to first token of the language model for so many tokens; random words stand in for visual ones."""
    ids_BN = _draw_words(model, images, tokens).to(model.device)
    run = partial(model, input_ids=ids_BN, use_cache=True, logits_to_keep=1)
    return {"tokens": tokens, "batch": images, "milliseconds": milliseconds(run, seconds) / images}


def _draw_words(model: Any, images: int, tokens: int) -> Tensor:
    """Random ids without those that the model's configuration names, such as an image's; int64 (B, N)."""
    named = [
        number
        for name, number in model.config.to_dict().items()
        if name.endswith(("_token_id", "_token_index")) and isinstance(number, int)
    ]
    ids_BN = torch.randint(model.get_input_embeddings().weight.shape[0], (images, tokens))
    return ids_BN.masked_fill(torch.isin(ids_BN, torch.tensor(named, dtype=torch.int64)), 0)
