"""Section `evaluate`: which reducers answer the questions, at which budgets."""

from collections.abc import Collection
from dataclasses import field
from typing import Annotated

from pydantic import AfterValidator, Field
from pydantic.dataclasses import dataclass

from atr.config.errors import refusal
from atr.config.fields import STRICT, Count, KeptFractions, check_names
from atr.config.own_files import check_own_files
from atr.core import catalog
from atr.core.layout import Budget, Interpolation, Newline, Positions

RESERVED = ("prefill",)
"""Names that no reducer may have: folders of experiments/latency that belong to other stages."""


def _check_listed(names: list[str], known: Collection[str], always: str = "") -> list[str]:
    check_names(names, known, "evaluate.own")
    if not names:
        raise refusal(names, f"one or more of {', '.join(known)}")
    if always and always not in names:
        raise refusal(names, f"a list with {always} in it")
    return names


def _check_reducers(names: list[str]) -> list[str]:
    return _check_listed(names, catalog.untrained(), "full")


def _check_selectors(names: list[str]) -> list[str]:
    return _check_listed(names, catalog.trained("pretrain"), "selector")


def _check_distilled(names: list[str]) -> list[str]:
    return _check_listed(names, catalog.trained("distill"))


def _check_own(names: list[str]) -> list[str]:
    for name in check_own_files(names, (*catalog.reducers(), *RESERVED)):
        try:
            weights = catalog.reducer_traits(name).weights
        except ValueError as error:
            problem, _, allowed = f"is not a reducer: {error}".partition(", allowed: ")
            raise refusal(name, allowed or "a Python file", problem=problem) from None
        if weights:
            raise refusal(name, f"a reducer without WEIGHTS; {name}.py has {weights!r}")
    return names


@dataclass(frozen=True, config=STRICT)
class Evaluate:
    """The reducers to evaluate, their budgets, and how answers are generated.

    The reducers are in four lists, by what their results depend on: the package alone, the selector of stage
    pretrain, the selector of stage distill, or the user's own file.
    """

    reducers: Annotated[list[str], AfterValidator(_check_reducers)] = field(
        default_factory=lambda: ["full", "none", "random"]
    )
    """Reducers without training (files of atr/reduction/peers), one DVC cell each; full, the reference of all
    others, is required. Without none or random the report omits their lines."""
    selectors: Annotated[list[str], AfterValidator(_check_selectors)] = field(
        default_factory=lambda: ["selector", "selector_adaptive"]
    )
    """Reducers made of the selector of stage pretrain (files of atr/reduction/trained), one DVC cell each;
    selector is required."""
    distilled: Annotated[list[str], AfterValidator(_check_distilled)] = field(
        default_factory=lambda: ["distilled"]
    )
    """Reducers made of the selector of stage distill (files of atr/reduction/trained), one DVC cell
    each."""
    own: Annotated[list[str], AfterValidator(_check_own)] = field(default_factory=list)
    """Your own reducers, one DVC cell each: paths of Python files in the project, without `.py`."""
    keep: KeptFractions = field(default_factory=lambda: [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
    """Kept fractions of an image's tokens; the count is rounded to nearest, halves up, at least 1. A reducer
    that prunes inside the language model keeps them on average over its layers; fractions that it cannot
    reach are left out."""
    random_seeds: Annotated[int, Field(ge=1, le=1000)] = 2
    """Draws of each random reducer, with seeds 0 and up whatever `seed` is; its score is their mean. With
    two, the interval of neither group is wider than the selector's widest: see docs/evaluation.md."""
    positions: Positions = "original"
    """Position ids after the reduction: original (with gaps), or contiguous (renumbered)."""
    budget: Budget = "image"
    """Budget of an image cut into tiles: image (its tiles compete for it, as a page has empty corners), or
    tile (each tile gets a share in proportion to its tokens)."""
    newline: Newline = "keep"
    """Newline tokens at the ends of rows: keep (all of them, as in the model's training; they do not count
    towards the budget), or follow (only those of rows with a kept token)."""
    interpolation: Interpolation = "model"
    """For large images, whose features LLaVA-OneVision shrinks: model (select among the shrunk features, so
    that full is the model as published), or off (select among all features, as in the paper)."""
    batch_tokens: Count = 20_000
    """Tokens per batch: those of the text and, before the reduction, of the images, which count once for all
    questions about them if `share_prefix` is true. A batch has at least one question."""
    share_prefix: bool = True
    """Whether the questions about an image are answered from one reading of its tokens. Answers are the same
    in float32, and may differ by rounding in bfloat16. A model whose cache cannot be shared, as with sliding
    windows, reads each prompt by itself."""
    max_new_tokens: Count = 8
    """Maximum number of tokens of an answer."""
    # All resamples are held in memory.
    bootstrap: Annotated[int, Field(ge=1, le=100_000)] = 1000
    """Resamples of the questions for a 95 % interval."""

    @property
    def names(self) -> list[str]:
        """All reducers, one DVC cell each."""
        return [*self.reducers, *self.own, *self.selectors, *self.distilled]

    @property
    def budgeted(self) -> list[str]:
        """The reducers that take a budget."""
        return [name for name in self.names if catalog.reducer_traits(name).budget == "asked"]
