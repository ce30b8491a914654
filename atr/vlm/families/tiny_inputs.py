"""Inputs of tiny models as their processors would make them, without a processor: any images in any rows.

Shapes: L tokens of a row.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from atr.vlm.families.tiny_pixels import TinyImages, draw_images

ROWS: tuple[tuple[int, ...], ...] = ((0,), (1, 2), ())
"""Images of each row of the default batch: one image, two of other sizes, none."""
_TEXT_IDS = (3, 60)
"""Ordinary tokens are drawn from this range, below all special ones."""


def tiny_inputs(
    model: Any, rows: Sequence[Sequence[int]] = ROWS, seed: int = 0, padding: str = "left"
) -> dict[str, Tensor]:
    """The processor's output for `rows`, each with the images of the given numbers, among text.

    Equal numbers are equal images, up to the length of TINY_IMAGES. A row's text depends on its images and on
    `seed` only, so that a row has the same tokens in any batch. Raises ValueError, one line, for a model
    whose pixels are of no known layout.
    """
    made = draw_images(model, rows) if any(rows) else TinyImages({}, [])
    # Some towers leave it to the user to cast pixels to the model's dtype.
    pixels = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in made.pixels.items()}
    runs = iter(made.runs)
    ids = [_row_ids(model, [next(runs) for _ in images], (seed, *images)) for images in rows]
    longest = max(map(len, ids))
    pad = (lambda missing: (missing, 0)) if padding == "left" else (lambda missing: (0, missing))
    input_ids = torch.stack([F.pad(row, pad(longest - len(row)), value=0) for row in ids])
    mask = torch.stack([F.pad(torch.ones_like(row), pad(longest - len(row))) for row in ids])
    return {"input_ids": input_ids, "attention_mask": mask, **pixels, **_token_types(model, input_ids)}


def _row_ids(model: Any, images: Sequence[Sequence[int]], seed: Sequence[int]) -> Tensor:
    """Text, and each image's runs of placeholders between its tags; int64 (L,)."""
    generator = torch.Generator().manual_seed(hash(tuple(seed)) % 2**31)
    low, high = _TEXT_IDS

    def text(count: int) -> list[int]:
        return torch.randint(low, high, (count,), generator=generator).tolist()

    tokens = text(3 + seed[-1] % 3 if images else 5)
    for number, runs in enumerate(images):
        tokens += text(2 * number) + _image_ids(model.config, runs)
    return torch.tensor(tokens + text(4))


def _image_ids(config: Any, runs: Sequence[int]) -> list[int]:
    """The placeholders of an image with the tags that the family's processor puts around them."""
    start, end, tile, whole = _tags(config)
    style = _STYLES.get(config.model_type, _PLAIN)
    ids = [start]
    for at, length in enumerate(runs):
        is_last = at == len(runs) - 1
        tags = {"tile": tile, "whole": whole if is_last else tile, "end": whole if at else end}
        if style.before and (at or style.first) and (len(runs) > 1 or style.single):
            ids.append(tags[style.before])
        ids += [config.image_token_id] * length
        if style.after:
            ids.append(tags[style.after])
    return ids if style.after == "end" else [*ids, end]


@dataclass(frozen=True)
class _Style:
    """The tags `before` and `after` the runs of an image; of the `first` run, and of a `single` one, too."""

    before: str = ""
    after: str = ""
    first: bool = True
    single: bool = True


_PLAIN = _Style()
_STYLES = {
    "aya_vision": _Style(before="whole"),
    "cohere2_vision": _Style(after="tile"),
    "idefics3": _Style(before="whole"),
    "lfm2_vl": _Style(before="whole", single=False),
    "minicpmv4_6": _Style(before="tile", after="end", first=False),
    "mistral3": _Style(before="tile", first=False),
    "ovis2": _Style(after="tile"),
    "smolvlm": _Style(before="whole"),
}
"""Families of several runs an image."""


def _tags(config: Any) -> tuple[int, int, int, int]:
    """The start and end of an image, and the tags of a tile and of the tile of the whole image."""
    start = _first_of(
        config, ("vision_start_token_id", "image_start_token_id", "boi_token_id", "boi_token_index")
    )
    end = _first_of(config, ("vision_end_token_id", "image_end_token_id", "eoi_token_id", "eoi_token_index"))
    if indicators := getattr(config, "visual_indicator_token_ids", None):
        return indicators[0], indicators[-1], indicators[1], indicators[2]
    first = _TEXT_IDS[1]
    return (start or first), (end or first + 1), first + 2, first + 3


def _first_of(config: Any, names: Sequence[str]) -> Any:
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


def _token_types(model: Any, input_ids: Tensor) -> dict[str, Tensor]:
    """The kinds of tokens that the model's forward names: 1 for an image's, 0 for text."""
    names = inspect.signature(model.forward).parameters
    is_image = input_ids == model.config.image_token_id
    types = {}
    if "mm_token_type_ids" in names:
        types["mm_token_type_ids"] = is_image.long()
    if "token_type_ids" in names:  # PaliGemma's are 0 for all of a prompt
        types["token_type_ids"] = is_image.long() * (model.config.model_type != "paligemma")
    if "moe_mm_token_type_ids" in names:  # start and end belong to the image
        borders = torch.tensor(_tags(model.config)[:2])
        types["moe_mm_token_type_ids"] = (is_image | torch.isin(input_ids, borders)).long()
    return types
