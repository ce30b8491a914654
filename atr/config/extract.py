"""Section `extract`: one pass of the frozen encoder over the images."""

from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from atr.config.fields import LAYERS, STRICT, Count, Workers


@dataclass(frozen=True, config=STRICT)
class Extract:
    """How features are extracted and stored."""

    layer: Annotated[int | None, Field(ge=-LAYERS, le=LAYERS)] = None
    """Index into `hidden_states`; null takes the encoder preset's. The paper gives none; LLaVA reads -2."""
    batch_size: Count = 32
    """Images per step on each device; more do not fit a CPU's caches, and are a sixth slower."""
    shard_images: Count = 1024
    """Images per file of the store; bounds the memory for writing and reading."""
    workers: Workers = 1
    """Threads that decode images ahead of the encoder; 0 decodes between its batches."""
