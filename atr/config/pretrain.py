"""Section `pretrain`: the training of the paper's autoencoder."""

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from atr.config.fields import STRICT, Count, OpenFraction
from atr.config.selector_training import SelectorTraining


@dataclass(frozen=True, config=STRICT)
class Pretrain(SelectorTraining):
    """The paper's autoencoder; fields give reasons for choices that the paper leaves open."""

    # Logits are divided by the temperature, so float32 overflows far below 0.01.
    temperature: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    """Temperature of the Gumbel noise; constant, as training at 1 did not collapse and needs no schedule."""
    keep: OpenFraction = 0.45
    """The proportion p of Eq. 7. One p serves all budgets, as the top K of one ranking serve every K. Tokens
    are ranked reliably only near p, so choose p near the middle of the budgets you evaluate."""
    normalise: Literal["none", "variance"] = "variance"
    """none: the raw L2 norm of Eq. 7; variance: divided by the features' variance, so that both terms are of
    similar size."""
    initial_bias: Annotated[float, Field(ge=-20, le=20)] = 2.0
    """Bias of the selector's linear layer; at 2 training starts by keeping 88 % of the tokens, so that the
    reconstructor learns before the selector drops any."""
    collapse_after: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Fraction of the steps after which a kept fraction outside [p/2, 1.5p + 0.05] stops the run."""
    mask_images: Count = 6
    """Validation images whose masks are drawn after each epoch."""
