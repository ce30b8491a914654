"""Section `latency`: what is timed."""

from dataclasses import field
from typing import Annotated

from pydantic import AfterValidator, Field
from pydantic.dataclasses import dataclass

from atr.config.errors import refusal
from atr.config.fields import MANY, STRICT, KeptFractions, are_distinct


def _check_batches(batches: list[int]) -> list[int]:
    if not (are_distinct(batches) and all(1 <= batch <= MANY for batch in batches)):
        raise refusal(batches, f"one or more distinct counts >= 1, at most {MANY}")
    return batches


@dataclass(frozen=True, config=STRICT)
class Latency:
    """How selection and prefill are timed."""

    kept: KeptFractions = field(default_factory=lambda: [0.2, 0.5])
    """Kept fractions."""
    batches: Annotated[list[int], AfterValidator(_check_batches)] = field(default_factory=lambda: [1, 32])
    """Batch sizes in images."""
    seconds: Annotated[float, Field(gt=0, le=60)] = 0.2
    """Minimum duration of each measurement in seconds; the median call is reported."""
