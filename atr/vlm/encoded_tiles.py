"""The encoder's output for tiles whose grids differ: those of one grid share a tensor.

Shapes: B tiles of a group, N tokens of a tile, D width.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor

from atr.core.ragged import Grid
from atr.reduction import EncoderOutput


@dataclass(frozen=True, eq=False)
class EncodedTiles:
    """Encoder outputs of a batch of tiles, one for each grid; `members` are the numbers of a group's tiles.

    `output` is what the model's own `get_image_features` returned, for families that are encoded by it.
    """

    groups: tuple[EncoderOutput, ...]
    members: tuple[tuple[int, ...], ...]
    output: Any = field(default=None, repr=False)

    @classmethod
    def of_one_grid(cls, encoded: EncoderOutput) -> Self:
        """Tiles that all have the grid of `encoded`."""
        return cls((encoded,), (tuple(range(len(encoded.features_BND))),))

    @classmethod
    def of_grids(
        cls,
        grids: Sequence[Grid],
        fields: Mapping[str, Sequence[Tensor]],
        output: Any = None,
    ) -> Self:
        """Tiles with a grid each; `fields` are those of EncoderOutput, with one (N, ...) per tile."""
        members: dict[Grid, list[int]] = {}
        for tile, grid in enumerate(grids):
            members.setdefault(grid, []).append(tile)
        groups = []
        for grid, tiles in members.items():
            stacked: dict[int, Tensor] = {}  # one tensor where two fields are the same tokens
            for values in fields.values():
                if id(values) not in stacked:
                    stacked[id(values)] = _stack([values[tile] for tile in tiles])
            named: dict[str, Any] = {name: stacked[id(values)] for name, values in fields.items()}
            groups.append(EncoderOutput(grid=grid, **named))
        return cls(tuple(groups), tuple(map(tuple, members.values())), output)

    def __iter__(self) -> Iterator[tuple[tuple[int, ...], EncoderOutput]]:
        """The numbers of the tiles of each group, and their encoder output."""
        return zip(self.members, self.groups, strict=True)

    @property
    def whole(self) -> EncoderOutput:
        """The encoder output of all tiles; only where they have one grid."""
        (encoded,) = self.groups
        return encoded

    def by_tile(self, values: Sequence[Tensor | Sequence[Tensor]]) -> list[Tensor]:
        """Values (B, N, ...) of each group as one (N, ...) per tile."""
        tiles: dict[int, Tensor] = {}
        for members, values_BNX in zip(self.members, values, strict=True):
            tiles |= dict(zip(members, values_BNX, strict=True))
        return [tiles[tile] for tile in range(len(tiles))]

    def map(self, compute: Callable[[EncoderOutput], Tensor]) -> list[Tensor]:
        """What `compute` gives for each group (B, N, ...), as one (N, ...) per tile."""
        return self.by_tile([compute(encoded) for encoded in self.groups])

    def value(self, name: str) -> list[Tensor]:
        """A field of EncoderOutput, one (N, ...) per tile; raises ValueError if it was not encoded."""
        return self.by_tile([encoded.require(name) for encoded in self.groups])

    def has(self, name: str) -> bool:
        """Whether a field of EncoderOutput was encoded."""
        return all(getattr(encoded, name) is not None for encoded in self.groups)

    def of(self, tiles: Sequence[int]) -> "EncodedTiles":
        """The output for some of the tiles, in the given order; a tile may occur more than once."""
        groups, members = [], []
        for numbers, encoded in self:
            place = {number: row for row, number in enumerate(numbers)}
            chosen = [(new, place[tile]) for new, tile in enumerate(tiles) if tile in place]
            if chosen:
                new_numbers, rows = zip(*chosen, strict=True)
                groups.append(encoded.of(rows))
                members.append(new_numbers)
        return EncodedTiles(tuple(groups), tuple(members), self.output)

    def with_text(self, text_BD: Tensor) -> "EncodedTiles":
        """The same with the text of each tile."""
        groups = [
            replace(encoded, text_BD=text_BD[torch.tensor(numbers, device=text_BD.device)])
            for numbers, encoded in self
        ]
        return replace(self, groups=tuple(groups))


def _stack(tiles: Sequence[Tensor]) -> Tensor:
    """The tiles in one tensor; a view if there is only one, because an image may have thousands of tokens."""
    return tiles[0][None] if len(tiles) == 1 else torch.stack(list(tiles))
