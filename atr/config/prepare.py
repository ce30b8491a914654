"""Section `prepare`: images to pretrain on and questions to evaluate with."""

import os
from dataclasses import field
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, model_validator
from pydantic.dataclasses import dataclass

from atr.config.errors import refusal
from atr.config.fields import STRICT, Count, check_names
from atr.config.own_files import check_own_files
from atr.core import catalog

MICRO_BENCHMARKS = ("docs", "signs", "charts", "shapes", "digits", "scenes")
PROMPTS = ("Describe the image in detail.", "What does the text in the image say?")


def _check_source(source: str) -> str:
    if not (source in ("micro", "coco") or os.path.isdir(source)):
        raise refusal(source, "micro, coco, or a folder that exists")
    return source


def _check_repository(repository: str) -> str:
    if not (repository == "hub" or os.path.isdir(repository)):
        raise refusal(repository, "hub, or a folder that exists")
    return repository


def _check_prompts(prompts: list[str]) -> list[str]:
    if not (prompts and all(prompt.strip() for prompt in prompts)):
        raise refusal(prompts, "one or more texts")
    return prompts


def _check_benchmarks(names: list[str]) -> list[str]:
    return check_names(names, catalog.benchmarks(), "prepare.own")


def _check_own(names: list[str]) -> list[str]:
    for name in check_own_files(names, catalog.benchmarks()):
        try:
            catalog.benchmark_group(name)
        except ValueError as error:
            problem = f"is not a benchmark: {str(error).partition(', allowed: ')[0]}"
            raise refusal(name, "a Python file with GROUP = 'text' or 'general'", problem=problem) from None
    return names


@dataclass(frozen=True, config=STRICT)
class Prepare:
    """Where images and questions come from, and how many there are."""

    source: Annotated[str, AfterValidator(_check_source)] = "micro"
    """Source of the pretraining images: micro (the micro world), coco, or a folder of images."""
    images: Count = 5120
    """Number of pretraining images; the paper uses 100,000."""
    questions: Count = 300
    """Held-out questions of each benchmark, a seeded sample; all if there are fewer."""
    split: Literal["evaluate", "validation"] = "evaluate"
    """Split of the micro world's questions: evaluate, which is held out, or validation, for model
    selection."""
    benchmarks: Annotated[list[str], AfterValidator(_check_benchmarks)] = field(
        default_factory=lambda: list(MICRO_BENCHMARKS)
    )
    """Names of benchmarks: the files of atr/benchmarks that have a GROUP. With source micro, the pretraining
    images are of the same kinds."""
    own: Annotated[list[str], AfterValidator(_check_own)] = field(default_factory=list)
    """Your own benchmarks: paths of Python files in the project, without `.py`."""
    prompts: Annotated[list[str], AfterValidator(_check_prompts)] = field(
        default_factory=lambda: list(PROMPTS)
    )
    """Prompts about pretraining images for stage distill; images of the micro world have their own
    questions."""
    repository: Annotated[str, AfterValidator(_check_repository)] = "hub"
    """Where coco and the hub's benchmarks are read from: hub, or a folder with each dataset under its hub
    id."""

    @property
    def names(self) -> list[str]:
        """All benchmarks."""
        return [*self.benchmarks, *self.own]

    @model_validator(mode="after")
    def _check_any(self) -> Self:
        if not self.names:
            raise refusal([], f"one or more of {', '.join(catalog.benchmarks())}", "benchmarks")
        return self
