"""The parameters of the micro world: a dataclass for each section of data/micro/params.yaml."""

from dataclasses import field
from pathlib import Path
from typing import Annotated, Self, cast

from pydantic import AfterValidator, Field, model_validator
from pydantic.dataclasses import dataclass

from atr.config import loader
from atr.config.common import Seed
from atr.config.errors import refusal
from atr.config.fields import (
    LAYERS,
    STRICT,
    Count,
    LayerCount,
    LearningRate,
    OpenFraction,
    Share,
    Workers,
    are_distinct,
)
from atr.config.trainer import Trainer


def _check_sizes(sizes: list[int]) -> list[int]:
    if not (are_distinct(sizes) and all(14 <= size <= 1400 and size % 14 == 0 for size in sizes)):
        raise refusal(sizes, "one or more distinct multiples of 14, at most 1400")
    return sizes


def _check_width(width: int) -> int:
    if not (64 <= width <= 8192 and width % 64 == 0):
        raise refusal(width, "a multiple of 64, at most 8192")
    return width


@dataclass(frozen=True, config=STRICT)
class MicroCommon:
    """The key outside any section."""

    seed: Seed = 0
    """Seeds the images, the questions and the trainings."""


@dataclass(frozen=True, config=STRICT)
class Recipe:
    """How a small vision-language model is trained."""

    steps: Count = 15000
    """Optimizer steps of both phases."""
    reading: Share = 0.35
    """Fraction of the steps in which the model only learns to read; without them it learns nothing."""
    reading_weight: Share = 0.3
    """Weight of the patch losses after the reading phase, so that reading is not unlearned."""
    batch_size: Count = 8
    """Images per step; smaller batches learn more from the same images."""
    learning_rate: LearningRate = 5e-4
    """Peak learning rate of AdamW; training stalls at 1e-3."""
    weight_decay: Share = 0.05
    """Weight decay of AdamW."""
    warmup_steps: Count = 200
    """Steps of linear warm-up of the learning rate."""
    constant: Share = 0.6
    """Fraction of the steps before the learning rate falls linearly to 2 %."""
    epochs: Count = 20
    """Equal parts of the training; each ends with a checkpoint and a score on validation questions."""
    workers: Workers = 1
    """Processes that draw images; 0 draws in the main process."""
    compile: bool = True
    """Compile tower and language model: 1.3 times as fast on a CPU, needs a C++ compiler."""
    questions: Count = 500
    """Held-out questions of each benchmark for the model card's scores."""

    @model_validator(mode="after")
    def _check_epochs(self) -> Self:
        if self.steps % self.epochs:
            raise refusal(self.epochs, f"a divisor of steps, {self.steps}", "epochs")
        return self


@dataclass(frozen=True, config=STRICT)
class Micro(Recipe):
    """Training of the first model, tower included."""

    width: Annotated[int, AfterValidator(_check_width)] = 192
    """Channels of tower, projector and language model, 64 per attention head."""
    layers: LayerCount = 4
    """Transformer layers of the tower."""
    reading_layer: int = 2
    """Tower layer whose patches learn to read their characters, as do those of the last layer."""
    naming_layer: int = 3
    """Tower layer whose patches learn to name what they show, as do those of the projector."""
    text_layers: LayerCount = 4
    """Layers of the language model."""

    @model_validator(mode="after")
    def _check_layers(self) -> Self:
        for key in ("reading_layer", "naming_layer"):
            if not 0 <= (layer := getattr(self, key)) <= self.layers:
                raise refusal(layer, f"0 <= {key} <= layers, {self.layers}", key)
        return self


@dataclass(frozen=True, config=STRICT)
class MicroDinov2(Recipe):
    """Training of the second model, on stored features of the frozen encoder dinov2-small.

    Its language model has `new_layers` new layers below those of the first model, which can already look up
    what a question asks for. In the new layers each patch attends to earlier ones, because a frozen tower's
    features of a value hold little information on its key.
    """

    new_layers: Annotated[int, Field(ge=0, le=LAYERS)] = 2
    """New layers; after the last of them patches learn to name what they show. In a test without the first
    model's layers above, the held-out naming loss, averaged over all patches, was 1.63 after 240 steps, and
    1.87 if applied at the projector."""
    compile: bool = False
    """Compile the language model; no faster on a CPU when a layer's hidden states are needed."""


@dataclass(frozen=True, config=STRICT)
class MicroProbe:
    """The probe that finds the layer and image size at which dinov2-small encodes characters best."""

    images: Annotated[int, Field(ge=4, le=2**31 - 1)] = 400
    """Lessons that train the probes; another `images // 4` are held out."""
    sizes: Annotated[list[int], AfterValidator(_check_sizes)] = field(default_factory=lambda: [224, 252, 336])
    """Sides in pixels to which images are resized, multiples of the patch size 14."""


@dataclass(frozen=True, config=STRICT)
class MicroFeatures:
    """The lessons of the second model, whose images the frozen encoder encodes once."""

    images: Annotated[int, Field(ge=2, le=2**31 - 1)] = 24000
    """Lessons; each is used many times, with other questions or in another order."""
    reading: OpenFraction = 0.3
    """Fraction of the lessons that are for the reading phase; the others are for the answering phase."""
    charts: Share = 0.3
    """Fraction of charts in both phases; they take longest to learn, see `MicroTraining`."""
    batch_size: Count = 16
    """Images per step on each device."""
    workers: Workers = 0
    """Threads that draw images ahead of the encoder; 0 draws between its batches."""

    @property
    def reading_images(self) -> int:
        """Number of lessons of the reading phase, which come first in the store."""
        return round(self.images * self.reading)

    @model_validator(mode="after")
    def _check_kinds(self) -> Self:
        if not 0 < self.reading_images < self.images:
            raise refusal(self.reading, "0 < reading < 1, with an image of each kind at least", "reading")
        return self


@dataclass(frozen=True, config=STRICT)
class MicroSelectors:
    """The held-out scores in the model cards of the shipped selectors."""

    keep: OpenFraction = 0.4
    """Fraction of the visual tokens that is kept."""
    questions: Count = 100
    """Held-out questions of each benchmark."""


class MicroParams(loader.Params):
    """The parameters that one stage of the micro world declares, read-only."""

    micro: Micro
    micro_probe: MicroProbe
    micro_features: MicroFeatures
    micro_dinov2: MicroDinov2
    micro_selectors: MicroSelectors


MICRO_STAGES = {
    "micro": ("seed", "trainer", "micro"),
    "micro_probe": ("seed", "micro_probe"),
    "micro_features": ("seed", "trainer", "micro_features"),
    "micro_dinov2": ("seed", "trainer", "micro_features", "micro_dinov2"),
    "micro_selectors": ("seed", "micro_selectors"),
}
"""The parameters that each stage declares, and the only ones it gets."""

MICRO_SECTIONS = {
    "trainer": Trainer,
    "micro": Micro,
    "micro_probe": MicroProbe,
    "micro_features": MicroFeatures,
    "micro_dinov2": MicroDinov2,
    "micro_selectors": MicroSelectors,
}

PARAMETERS = loader.ParameterFile("data/micro/params.yaml", MicroCommon, MICRO_SECTIONS, MICRO_STAGES)


def load_micro(stage: str, path: str | Path = "") -> MicroParams:
    """Check the whole file and return the sections that the stage declares, as `atr.config.load` does."""
    return cast(MicroParams, loader.load(stage, path, PARAMETERS))


def load_micro_or_exit(stage: str, path: str | Path = "") -> MicroParams:
    """Return what `load_micro` does; if it raises ConfigError, print its line to stderr and exit with 2."""
    return cast(MicroParams, loader.load_or_exit(stage, path, PARAMETERS))
