"""Section `robustness`: selections and answers where deployment differs from training."""

from dataclasses import field

from pydantic.dataclasses import dataclass

from atr.config.fields import STRICT, Count, KeptFractions


@dataclass(frozen=True, config=STRICT)
class Robustness:
    """The questions and budgets on which each deployment is compared with the reference."""

    questions: Count = 20
    """Number of held-out questions of each benchmark, from the first; all if there are fewer."""
    keep: KeptFractions = field(default_factory=lambda: [0.3, 0.5])
    """Kept fractions."""
