"""Fields shared by the sections `pretrain` and `distill`: the selector's size and its optimizer."""

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from atr.config.fields import STRICT, Count, LayerCount, LearningRate, OpenFraction, Share


@dataclass(frozen=True, config=STRICT)
class SelectorTraining:
    """The selector and the settings that all of its trainings share."""

    layers: LayerCount = 3
    """Transformer layers of the selector, and of the reconstructor; stated by the paper."""
    heads: LayerCount = 3
    """Attention heads per layer, a divisor of the feature width; 64 channels per head, as in the encoders."""
    # Below 0.1 a narrow selector would have no hidden channel at all.
    ffn_ratio: Annotated[float, Field(ge=0.1, le=16)] = 4.0
    """Ratio of the feed-forward block's hidden width to the feature width; 4 as in the encoders."""
    position: Literal["none", "sine"] = "sine"
    """none, or sine: fixed 2-D sine embeddings added to the input, for towers whose features carry no
    position."""
    temperature: float = 1.0
    """Temperature of the Gumbel noise."""
    learning_rate: LearningRate = 5e-4
    """Peak learning rate of AdamW; the authors' later work uses 3e-4 for wider features and batches of 32."""
    weight_decay: Share = 0.01
    """Weight decay of AdamW; its default."""
    warmup: Share = 0.05
    """Fraction of the steps with a linear rise of the learning rate, before its cosine decay."""
    epochs: Count = 2
    """Passes over the images; the authors' later work makes 40."""
    batch_size: Count = 16
    """Images per step on each device. Small: each image already contributes N tokens, so more steps beat
    larger batches."""
    validation: OpenFraction = 0.05
    """Fraction of the images held out of the training."""
