"""Milliseconds per image of a selection and of the language model's prefill.

The images are noise, one tile each: the time of towers and language models does not depend on pixel values.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from atr.core.timing import milliseconds
from atr.core.tokens import budget
from atr.features.attention_hooks import CAPTURABLE
from atr.reduction import EncoderOutput, Merger, Reducer
from atr.reduction.checked import select, select_merged
from atr.vlm.families import Tiling
from atr.vlm.families.tower import encode_tiles, token_grid


def noise(model: Any, images: int, seed: int) -> Tensor:
    """Noise in the shape of the tower's pixel values, one tile per image; pixels_BCHW."""
    vision = model.config.vision_config
    size = (images, vision.num_channels, vision.image_size, vision.image_size)
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(model.device)


def encode_noise(model: Any, pixels_BCHW: Tensor, needs: frozenset[str] = frozenset()) -> EncoderOutput:
    """Encode the noise with the fields in `needs`; the mean token of an image stands in for its question."""
    tiling = Tiling.of_one_grid((1,) * len(pixels_BCHW), token_grid(model, pixels_BCHW))
    images = encode_tiles(model, {"pixel_values": pixels_BCHW}, tiling, needs)
    assert images.projected_BND is not None
    return replace(images, text_BD=F.normalize(images.projected_BND.float().mean(1), dim=-1))


@torch.inference_mode()
def time_selection(
    model: Any, reducer: Reducer, kept: Sequence[float], pixels_BCHW: Tensor, seconds: float
) -> Iterator[dict[str, Any]]:
    """Time of a selection at each fraction of `kept`, including the attention and keys that it needs.

    Their time is that of the tower's forward with them minus that without. Each time is measured for at least
    `seconds`.
    """
    images, encoded = len(pixels_BCHW), encode_noise(model, pixels_BCHW, reducer.needs)
    extra = 0.0
    if observed := reducer.needs & set(CAPTURABLE):
        plain, observing = (
            milliseconds(partial(encode_noise, model, pixels_BCHW, needs), seconds)
            for needs in (frozenset[str](), observed)
        )
        extra = max(0.0, observing - plain)
    for fraction in kept:
        count = budget(fraction, encoded.tokens)
        spent = milliseconds(partial(_select, reducer, encoded, count), seconds)
        yield {
            "tokens": encoded.tokens,
            "kept": count,
            "batch": images,
            "milliseconds": (spent + extra) / images,
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
    """Time to first token of the language model, from the visual tokens alone, without text."""
    width = model.config.get_text_config().hidden_size
    tokens_BND = torch.randn(images, tokens, width, device=model.device, dtype=model.dtype)
    run = partial(model, inputs_embeds=tokens_BND, use_cache=True, logits_to_keep=1)
    return {"tokens": tokens, "batch": images, "milliseconds": milliseconds(run, seconds) / images}
