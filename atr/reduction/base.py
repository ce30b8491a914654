"""The data every reducer reads, and the protocols of reducers.

Shapes: B images (or tiles), N tokens in raster order, K kept tokens, D width; as in `atr.core.tokens`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class EncoderOutput:
    """The encoder's output for B images (or tiles), with optional signals for the reducers that need them.

    `grid` is (rows, columns) of the tokens; None for the tokens of several tiles packed into one sequence.
    Raises ValueError if the number of grid cells differs from the number of tokens.
    """

    features_BND: Tensor
    grid: tuple[int, int] | None
    attention_BN: Tensor | None = None
    """Attention that each token receives in the layer whose output is read, float32: from the class token,
    averaged over heads; without class token averaged over all queries (column mean of the matrix)."""
    first_attention_BN: Tensor | None = None
    """The same attention in the encoder's first layer."""
    keys_BND: Tensor | None = None
    """Keys in the layer whose output is read, averaged over heads; their width differs from the features'."""
    projected_BND: Tensor | None = None
    """Tokens after the projector, in the embedding space of the language model; of that model's width."""
    text_BD: Tensor | None = None
    """Question of each image in the space of `projected_BND`: the mean of its tokens' unit embeddings, whose
    product with a unit vector is the vector's mean cosine to the question's tokens."""
    pixels_BCHW: Tensor | None = None
    """Pixel values as the encoder takes them."""
    image_key_BX: Tensor | None = None
    """Bit-exact identity of each image, which seeds random reducers independently of the batch: its pixel
    values. None if the features themselves are bit-exact, such as stored ones."""
    encode: Callable[[Tensor], Tensor] | None = None
    """The encoder: pixels_BCHW to features_BND."""

    def __post_init__(self) -> None:
        if self.grid and self.grid[0] * self.grid[1] != self.tokens:
            rows, columns = self.grid
            raise ValueError(f"grid {rows} x {columns} does not hold {self.tokens} tokens")

    @property
    def tokens(self) -> int:
        """Number of tokens of one image, N."""
        return self.features_BND.shape[1]

    def of(self, images: Sequence[int]) -> Self:
        """The output for some of the images, in the given order; an image may occur more than once."""
        index_R = torch.as_tensor(images, device=self.features_BND.device)
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        selected: dict[str, Any] = {key: v[index_R] for key, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **selected)

    def require(self, field: str) -> Tensor:
        """An optional tensor; raises ValueError if it was not encoded."""
        values: Tensor | None = getattr(self, field)
        if values is None:
            raise ValueError(f"{field} was not encoded, which the reducer needs")
        return values

    def require_grid(self) -> tuple[int, int]:
        """Rows and columns of the tokens; raises ValueError for packed tokens, which have no grid."""
        if self.grid is None:
            raise ValueError("grid was not encoded, which the reducer needs")
        return self.grid


class Reducer(Protocol):
    """Selects exactly `budget` distinct tokens of each image, independently of the other images in the batch.

    A reducer may also implement one or more of the protocols below.
    """

    @property
    def needs(self) -> frozenset[str]:
        """Names of the optional fields of EncoderOutput that it reads.

        A reducer that needs neither grid nor pixels treats the tokens as a set, so that it also serves the
        packed tokens of several tiles.
        """
        ...

    def __call__(self, encoded: EncoderOutput, budget: int) -> Tensor:
        """Kept indices, int64, in raster order; keep_BK with K = budget."""
        ...


@runtime_checkable
class Merger(Reducer, Protocol):
    """A reducer that replaces the kept tokens by new ones, each made from several tokens of the encoder."""

    def merge(self, encoded: EncoderOutput, budget: int) -> tuple[Tensor, Tensor]:
        """Kept indices keep_BK, as the call returns them, and the features (B, K, D) put in their places."""
        ...


@runtime_checkable
class Adaptive(Reducer, Protocol):
    """A reducer that chooses the number of tokens of each image itself."""

    def counts(self, encoded: EncoderOutput) -> Tensor:
        """Tokens worth keeping of each image, 0 to N; int64 (B,)."""
        ...


@runtime_checkable
class Scorer(Reducer, Protocol):
    """A reducer whose scores are comparable over the tiles of an image, so that tiles share one budget."""

    @property
    def threshold(self) -> float | None:
        """Score above which a token is worth keeping at any budget; None if scores only rank tokens."""
        ...

    def scores(self, encoded: EncoderOutput) -> Tensor:
        """Finite scores of all tokens, the highest kept first; scores_BN."""
        ...


@runtime_checkable
class Apportioner(Scorer, Protocol):
    """A scorer that splits an image's budget over its tiles; its scores are comparable within a tile."""

    def apportion(
        self,
        encoded: EncoderOutput,
        tile: int,
        arrangement: tuple[int, int],
        budget: int,
        sizes: Sequence[int],
    ) -> list[int]:
        """Tokens kept of each tile of one image, none above its size; they sum to `budget`.

        `tile` is the index, among the B tiles, of the tile that shows the whole image; the image's other
        tiles follow it, arranged in the rows and columns of `arrangement`. `sizes` are the tiles' token
        counts without padding.
        """
        ...
