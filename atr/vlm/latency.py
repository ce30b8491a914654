"""The time that selection takes and the prefill that it saves, in milliseconds an image.

The pictures are noise of one tile: neither towers nor language models take longer for some than for others.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from atr.core.timing import milliseconds
from atr.core.tokens import budget
from atr.features.attention_hooks import CAPTURABLE
from atr.reduction import EncoderOutput, Merger, Reducer
from atr.reduction.checked import ask, ask_merged
from atr.vlm.families import Llava, encode


def noise(model: Any, images: int, seed: int) -> Tensor:
    """Pixel values of pictures as the model's tower takes them, of one tile each; pixels_BCHW."""
    vision = model.config.vision_config
    size = (images, vision.num_channels, vision.image_size, vision.image_size)
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(model.device)


def encoded(model: Any, pixels_BCHW: Tensor, needs: frozenset[str]) -> EncoderOutput:
    """What reducers of these needs read of the pictures; the text is a stand-in, as a picture's own mean."""
    inputs = {"pixel_values": pixels_BCHW}
    images = encode(model, inputs, Llava().tiling(model, inputs), needs)
    assert images.projected_BND is not None
    return replace(images, text_BD=F.normalize(images.projected_BND.float().mean(1), dim=-1))


@torch.inference_mode()
def selection(
    model: Any, reducers: Mapping[str, Reducer], kept: Sequence[float], pixels_BCHW: Tensor, seconds: float
) -> Iterator[dict[str, Any]]:
    """Time of each reducer at each fraction of `kept`, that of the attention and keys it needs included.

    Those are the tower's forward with them minus the one without, measured at least for `seconds` each.
    """
    images = len(pixels_BCHW)

    @cache
    def tower(observed: frozenset[str]) -> float:
        return milliseconds(partial(encoded, model, pixels_BCHW, observed), seconds)

    for name, reducer in tqdm(reducers.items(), f"selection, batch {images}"):
        seen = encoded(model, pixels_BCHW, reducer.needs)
        observed = reducer.needs & set(CAPTURABLE)
        extra = max(0.0, tower(observed) - tower(frozenset())) if observed else 0.0
        for fraction in kept:
            count = budget(fraction, seen.tokens)
            spent = milliseconds(partial(_ask, reducer, seen, count), seconds)
            yield {
                "reducer": name,
                "tokens": seen.tokens,
                "kept": count,
                "batch": images,
                "milliseconds": (spent + extra) / images,
            }


def _ask(reducer: Reducer, images: EncoderOutput, count: int) -> object:
    # A copy, as a reducer may remember the scores of the object that it was asked for last.
    images = replace(images)
    return ask_merged(reducer, images, count) if isinstance(reducer, Merger) else ask(reducer, images, count)


@torch.inference_mode()
def prefill(model: Any, tokens: int, images: int, seconds: float) -> dict[str, Any]:
    """Time of the language model from the visual tokens alone, without text, to the first token it says."""
    width = model.config.get_text_config().hidden_size
    tokens_BND = torch.randn(images, tokens, width, device=model.device, dtype=model.dtype)
    run = partial(model, inputs_embeds=tokens_BND, use_cache=True, logits_to_keep=1)
    return {"tokens": tokens, "batch": images, "milliseconds": milliseconds(run, seconds) / images}
