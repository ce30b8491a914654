"""What every reducer reads and the shape of a reducer."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor


@dataclass(frozen=True)
class Encoded:
    """The encoder's output for B images (or tiles); grid, attention and keys where there are any.

    Tokens of several tiles packed into one sequence have no grid.
    Raises ValueError if the grid has another number of cells than there are tokens.
    """

    features_BND: Tensor
    grid: tuple[int, int] | None
    attention_BN: Tensor | None = None
    keys_BND: Tensor | None = None

    def __post_init__(self) -> None:
        if self.grid and self.grid[0] * self.grid[1] != self.tokens:
            rows, columns = self.grid
            raise ValueError(f"grid {rows} x {columns} does not hold {self.tokens} tokens")

    @property
    def tokens(self) -> int:
        """Number of tokens of one image, N."""
        return self.features_BND.shape[1]


class Reducer(Protocol):
    """Chooses exactly `budget` distinct tokens of each image, an image's choice independent of its batch."""

    @property
    def needs(self) -> frozenset[str]:
        """Names of the optional fields of Encoded that it reads.

        One that needs nothing takes the tokens as a set: it can be asked for an image of several tiles too.
        """
        ...

    def __call__(self, encoded: Encoded, budget: int) -> Tensor:
        """Kept indices, int64, in raster order; keep_BK with K = budget."""
        ...


@runtime_checkable
class Scorer(Reducer, Protocol):
    """A reducer whose scores compare over all tiles of an image, so that these can share one budget."""

    @property
    def threshold(self) -> float | None:
        """Score above which a token is worth keeping, whatever the budget; None where scores only compare."""
        ...

    def scores(self, encoded: Encoded) -> Tensor:
        """Finite scores of all tokens, the highest kept first; scores_BN."""
        ...
