"""What every reducer reads and the shape of a reducer."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Encoded:
    """The encoder's output for B images (or tiles) of one grid; attention and keys where they are needed.

    Raises ValueError if the grid has another number of cells than there are tokens.
    """

    features_BND: Tensor
    grid: tuple[int, int]
    attention_BN: Tensor | None = None
    keys_BND: Tensor | None = None

    def __post_init__(self) -> None:
        rows, columns = self.grid
        if rows * columns != self.tokens:
            raise ValueError(f"grid {rows} x {columns} does not hold {self.tokens} tokens")

    @property
    def tokens(self) -> int:
        """Number of tokens of one image, N."""
        return self.features_BND.shape[1]


class Reducer(Protocol):
    """Chooses exactly `budget` distinct tokens of each image, an image's choice independent of its batch."""

    @property
    def needs(self) -> frozenset[str]:
        """Names of the optional fields of Encoded that it reads."""
        ...

    def __call__(self, encoded: Encoded, budget: int) -> Tensor:
        """Kept indices, int64, in raster order; keep_BK with K = budget."""
        ...
