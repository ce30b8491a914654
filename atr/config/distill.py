"""Section `distill`: the training of a selector by the frozen language model."""

from typing import Annotated, Self

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from atr.config.errors import refusal
from atr.config.fields import STRICT, Count, LearningRate, OpenFraction
from atr.config.selector_training import SelectorTraining


@dataclass(frozen=True, config=STRICT)
class Distill(SelectorTraining):
    """The selector that learns from the frozen language model which tokens its answers depend on."""

    temperature: Annotated[float, Field(ge=0, le=100)] = 1.0
    """Temperature of the Gumbel noise that perturbs the scores; 0 adds none."""
    learning_rate: LearningRate = 8e-4
    """Peak learning rate of AdamW."""
    lowest: OpenFraction = 0.05
    """Smallest kept fraction of a training step; fractions are drawn uniformly, so that one ranking serves
    every budget."""
    highest: Annotated[float, Field(gt=0, le=1)] = 0.6
    """Largest kept fraction of a training step; above 0.6 nearly every ranking gives the same answers."""
    candidates: Annotated[float, Field(gt=0, le=1)] = 0.25
    """Fraction of the tokens that the model reads beside the kept ones, the best of the dropped ones, with
    almost no weight in attention, so that they receive a gradient; 1 reads all."""
    images: Count = 5120
    """Pretraining images to learn from, a seeded sample; all if there are fewer."""
    max_new_tokens: Count = 8
    """Maximum number of tokens of an answer to learn from."""

    @model_validator(mode="after")
    def _check_range(self) -> Self:
        if self.lowest > self.highest:
            raise refusal(self.highest, f"distill.lowest, {self.lowest}, <= highest <= 1", "highest")
        return self
