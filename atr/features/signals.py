"""Stored features, plus attention, keys and pixels computed on demand.

Shapes: see atr.core.tokens.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from atr.core.ragged import Grid
from atr.core.tower_layer import MERGED
from atr.features.attention_hooks import CAPTURABLE
from atr.features.store import FeatureStore

if TYPE_CHECKING:
    from atr.config.presets import EncoderPreset
    from atr.features.encoder import Encoder

COMPUTED_SIGNALS = frozenset({*CAPTURABLE, "pixels_BCHW", "encode"})
ENCODER_SIGNALS = COMPUTED_SIGNALS | {"grid"}
"""Needs of reducers that can be met without a language model."""
RAGGED_SIGNALS = frozenset({"grid"})
"""Those of them that can be met if images have grids of their own: the others come in rectangular batches."""
MERGED_SIGNALS = frozenset({"projected_BND"})
"""Needs that merged tokens meet besides, as they are what the language model is fed."""


def signals_of(store: FeatureStore) -> frozenset[str]:
    """Needs of reducers that can be met for a store without a language model."""
    signals = RAGGED_SIGNALS if store.is_ragged else ENCODER_SIGNALS
    return signals | MERGED_SIGNALS if store.manifest["layer"] == MERGED else signals


def load_store_encoder(
    store: FeatureStore, preset: "EncoderPreset", folder: Path, device: torch.device
) -> "Encoder":
    """The encoder of a store's features, on `device`; `folder` and errors as in `resolve_weights`."""
    # Most reducers need no encoder, and transformers takes seconds to import.
    from atr.features.encoder import Encoder
    from atr.features.pixel_bounds import bound_area
    from atr.features.wheel_weights import resolve_weights

    path, layer = resolve_weights(preset.path, folder), store.manifest["layer"]
    encoder = Encoder.load(path, layer, preset.name, preset.size)
    bound_area(encoder.image_processor, preset.min_pixels, preset.max_pixels, path)
    return encoder.to(device)


def sample_evenly(store: FeatureStore, images: int, batch_size: int) -> Iterator[list[str]]:
    """Ids of `images` evenly spaced images of a store (at most all), in batches of images of one grid."""
    count = min(images, len(store))
    by_grid: dict[Grid, list[str]] = {}
    for place in (number * len(store) // count for number in range(count)):
        by_grid.setdefault(store.grid_of(place), []).append(store.ids[place])
    for ids in by_grid.values():
        yield from (ids[start : start + batch_size] for start in range(0, len(ids), batch_size))


@torch.inference_mode()
def observe_signals(
    store: FeatureStore,
    ids: Sequence[str],
    picture: Callable[[str], Image.Image],
    encoder: Callable[[], "Encoder"],
    needs: Collection[str],
    device: torch.device,
) -> dict[str, Any]:
    """Fields of EncoderOutput for these images of one grid: features, grid, and the signals of `needs`.

    Opens pictures and loads the encoder only if `needs` asks for more than features and grid.
    """
    places = [store.index(name) for name in ids]
    features_BND = torch.stack([store[place] for place in places]).to(device)
    available = signals_of(store) & set(needs)
    fields = {"features_BND": features_BND, "grid": store.grid_of(places[0])}
    fields |= dict.fromkeys(MERGED_SIGNALS & available, features_BND)
    computed = COMPUTED_SIGNALS & available
    if not computed:
        return fields
    tower = encoder()
    pixels_BCHW = tower.preprocess([picture(name) for name in ids]).to(device)
    captured = tower.observe(pixels_BCHW, computed & set(CAPTURABLE))
    signals = {"pixels_BCHW": pixels_BCHW, "encode": tower, **captured}
    return fields | {name: signals[name] for name in computed}
