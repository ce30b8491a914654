"""Section `intrinsic`: metrics that need no language model."""

from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from atr.config.fields import STRICT, Count


@dataclass(frozen=True, config=STRICT)
class Intrinsic:
    """How each reducer is measured without a language model."""

    images: Count = 48
    """Held-out images to measure on, evenly spaced over all; all if there are fewer."""
    batch_size: Count = 24
    """Images per batch."""
    pretrain_images: Count = 5120
    """Training images of the reconstructor for random masks; all if there are fewer."""
    epochs: Count = 1
    """Passes over `pretrain_images`; the other settings of that training are those of `pretrain`."""
    overlap_keep: Annotated[float, Field(gt=0, le=1)] = 0.4
    """Kept fraction at which the overlap between reducers is measured."""
    training_seeds: Annotated[int, Field(ge=1, le=1000)] = 1
    """Selectors compared for stability: the one of stage pretrain, and further ones trained with other
    seeds."""
