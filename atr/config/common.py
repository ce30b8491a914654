"""The keys of params.yaml that are outside any section."""

from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from atr.config.fields import STRICT, Pixels

Seed = Annotated[int, Field(ge=0, lt=2**32)]


@dataclass(frozen=True, config=STRICT)
class Common:
    """Seed, encoder and vision-language model of the whole pipeline."""

    seed: Seed = 0
    """Seeds the data, the trainings, the bootstrap and the noise used in timing. Random reducers have
    seeds of their own, 0 and up: see `evaluate.random_seeds`."""
    encoder: str = "micro"
    """A preset (atr/config/presets/encoders), a folder, or a hub id; presets and hub ids may have a revision:
    name@revision."""
    vlm: str = "auto"
    """A preset (atr/config/presets/vlms), a folder, a hub id, or auto: the preset that reads the encoder."""
    min_pixels: Pixels = None
    """Smallest area of an image, for encoder and model alike: smaller images are enlarged. For processors of
    native resolution (Qwen's `min_pixels`); null: their own bound."""
    max_pixels: Pixels = None
    """Largest area of an image, for encoder and model alike: larger images are shrunk, so that it bounds the
    tokens of an image. For processors of native resolution (Qwen's `max_pixels`); null: their own bound."""
