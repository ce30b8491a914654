"""Section `report`: what the report compares and shows."""

from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from atr.config.fields import STRICT


@dataclass(frozen=True, config=STRICT)
class Report:
    """What the report compares and shows."""

    best: str = "distilled"
    """The reducer that all others are compared with: the project's best. It must be evaluated and take a
    budget."""
    pages: Annotated[int, Field(ge=1, le=3)] = 3
    """Held-out images of each benchmark whose kept patches are drawn, at the kept fraction nearest to the 0.4
    of the paper's Figure 1; the masks of three are stored."""
    # One picture holds them all.
    examples: Annotated[int, Field(ge=1, le=60)] = 6
    """Questions shown with their answers under full, random and selected tokens (the paper's Figure 8)."""
