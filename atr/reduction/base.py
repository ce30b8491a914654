"""What every reducer reads and the shape of a reducer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor


@dataclass(frozen=True)
class EncoderOutput:
    """The encoder's output for B images (or tiles); whatever else there is, where a reducer asks for it.

    Tokens of several tiles packed into one sequence have no grid.
    Raises ValueError if the grid has another number of cells than there are tokens.
    """

    features_BND: Tensor
    grid: tuple[int, int] | None
    attention_BN: Tensor | None = None
    """Attention that each token receives at the layer read, float32: the class token's, its mean over heads;
    of an encoder without class token the mean over all queries (the column mean of the matrix)."""
    first_attention_BN: Tensor | None = None
    """The same of the tower's first layer."""
    keys_BND: Tensor | None = None
    """Keys of the layer read, their mean over heads; of a width of their own."""
    projected_BND: Tensor | None = None
    """The tokens as the language model is fed them: after the projector; of a width of their own."""
    text_BD: Tensor | None = None
    """The question each image is shown for, among the `projected_BND`: the mean of the unit embeddings of its
    tokens, so that the product with a unit vector is the mean cosine to them."""
    pixels_BCHW: Tensor | None = None
    """Pixel values as the tower takes them."""
    image_key_BX: Tensor | None = None
    """What belongs to each image and is bit by bit the same in every batch, for what is drawn at random: its
    pixel values; None where its features are that, as stored ones."""
    encode: Callable[[Tensor], Tensor] | None = None
    """The encoder itself: pixels_BCHW to features_BND."""

    def __post_init__(self) -> None:
        if self.grid and self.grid[0] * self.grid[1] != self.tokens:
            rows, columns = self.grid
            raise ValueError(f"grid {rows} x {columns} does not hold {self.tokens} tokens")

    @property
    def tokens(self) -> int:
        """Number of tokens of one image, N."""
        return self.features_BND.shape[1]

    def of(self, images: Sequence[int]) -> Self:
        """The same of some of the images, in the order given; one may come more than once."""
        index_R = torch.as_tensor(images, device=self.features_BND.device)
        known = {field.name: getattr(self, field.name) for field in fields(self)}
        some: dict[str, Any] = {key: v[index_R] for key, v in known.items() if isinstance(v, Tensor)}
        return replace(self, **some)


class Reducer(Protocol):
    """Chooses exactly `budget` distinct tokens of each image, an image's choice independent of its batch."""

    @property
    def needs(self) -> frozenset[str]:
        """Names of the optional fields of EncoderOutput that it reads.

        One that needs nothing takes the tokens as a set: it can be asked for an image of several tiles too.
        """
        ...

    def __call__(self, encoded: EncoderOutput, budget: int) -> Tensor:
        """Kept indices, int64, in raster order; keep_BK with K = budget."""
        ...


@runtime_checkable
class Merger(Reducer, Protocol):
    """A reducer that makes new tokens: the ones it returns stand for others as well."""

    def merge(self, encoded: EncoderOutput, budget: int) -> tuple[Tensor, Tensor]:
        """Kept indices keep_BK, as the call returns them, and the features (B, K, D) put in their places."""
        ...


@runtime_checkable
class Adaptive(Reducer, Protocol):
    """A reducer that says how many tokens each image needs."""

    def counts(self, encoded: EncoderOutput) -> Tensor:
        """Tokens worth keeping of each image, 0 to N; int64 (B,)."""
        ...


@runtime_checkable
class Scorer(Reducer, Protocol):
    """A reducer whose scores compare over all tiles of an image, so that these can share one budget."""

    @property
    def threshold(self) -> float | None:
        """Score above which a token is worth keeping, whatever the budget; None where scores only compare."""
        ...

    def scores(self, encoded: EncoderOutput) -> Tensor:
        """Finite scores of all tokens, the highest kept first; scores_BN."""
        ...


@runtime_checkable
class Apportioner(Scorer, Protocol):
    """A scorer that splits the budget of an image over its tiles, within which its scores compare."""

    def apportion(
        self,
        encoded: EncoderOutput,
        tile: int,
        arrangement: tuple[int, int],
        budget: int,
        sizes: Sequence[int],
    ) -> list[int]:
        """Tokens kept of each tile of one image, none above its size; they sum to `budget`.

        `tile` shows the image whole and is the first of its tiles among the B, which have `sizes` tokens
        (without padding); `arrangement` are the rows and columns of the others.
        """
        ...
