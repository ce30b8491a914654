"""Stored features, and beside them what their encoder says of the same images."""

from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from atr.features.attention_hooks import FIELDS
from atr.features.encoder import Encoder
from atr.features.store import FeatureStore
from atr.features.wheel_weights import locate

if TYPE_CHECKING:
    from atr.config.presets import EncoderPreset

BESIDE = frozenset({*FIELDS, "pixels_BCHW", "encode"})
GIVEN = BESIDE | {"grid"}
"""Which of a reducer's needs are met without a language model."""


def encoder_of(store: FeatureStore, preset: "EncoderPreset", folder: Path, device: torch.device) -> Encoder:
    """The encoder whose features a store holds, on a device; `folder` and errors as in `locate`."""
    path, layer = locate(preset.path, folder), store.manifest["layer"]
    return Encoder.load(path, layer, preset.name, preset.size).to(device)


def evenly(store: FeatureStore, images: int, size: int) -> Iterator[list[str]]:
    """Names of so many images (all where there are fewer) at even steps through a store, `size` at a time."""
    count = min(images, len(store))
    names = [store.ids[place * len(store) // count] for place in range(count)]
    yield from (names[start : start + size] for start in range(0, count, size))


@torch.inference_mode()
def observed(
    store: FeatureStore,
    names: Sequence[str],
    picture: Callable[[str], Image.Image],
    encoder: Callable[[], Encoder],
    needs: Collection[str],
    device: torch.device,
) -> dict[str, Any]:
    """What reducers read of these images, by field: features as they are stored, and all of `needs` in GIVEN.

    No picture is opened and no encoder loaded where features and grid are enough.
    """
    features_BND = torch.stack([store[store.index(name)] for name in names]).to(device)
    fields = {"features_BND": features_BND, "grid": store.grid}
    beside = BESIDE & set(needs)
    if not beside:
        return fields
    tower = encoder()
    pixels_BCHW = tower.preprocess([picture(name) for name in names]).to(device)
    seen = tower.observe(pixels_BCHW, beside & set(FIELDS))
    known = {"pixels_BCHW": pixels_BCHW, "encode": tower, **seen}
    return fields | {name: known[name] for name in beside}
