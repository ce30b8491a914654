"""Section `intrinsic`: metrics that need no language model."""

from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from atr.config.fields import STRICT, Count


@dataclass(frozen=True, config=STRICT)
class Intrinsic:
    """What is measured of each reducer without a language model."""

    images: Count = 48
    """Held-out images to measure on, evenly spaced over all; all where there are fewer."""
    batch_size: Count = 24
    """Images per batch."""
    pretrain_images: Count = 5120
    """Images that the reconstructor of random masks is trained on; all where there are fewer."""
    epochs: Count = 1
    """Passes over these; the rest of that training is as in `pretrain`."""
    overlap_keep: Annotated[float, Field(gt=0, le=1)] = 0.4
    """Kept fraction at which the overlap between reducers is measured."""
    training_seeds: Annotated[int, Field(ge=1, le=1000)] = 1
    """Selectors that are compared with each other, the trained one among them; each further one is
    trained."""
