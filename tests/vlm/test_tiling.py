import pytest
import torch
from PIL import Image
from transformers.image_processing_utils import select_best_resolution

from atr.vlm.families import Tiling, family_of
from atr.vlm.tiling import ROW_END, TileLayout

SIDE = 4  # rows and columns of tokens of a tile
SHAPES = [(30, 30), (56, 56), (20, 60), (60, 20), (50, 41), (84, 50), (1, 1), (3, 500), (500, 3)]
TILED = pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])


def grid_rows(model, shape):
    """(tile, token) of each place of an image's grid of tiles that is no padding, row by row, worked by hand.

    The image was scaled into the grid and centred, so the padding is on two sides.
    """
    height, width = select_best_resolution(shape, model.config.image_grid_pinpoints)
    rows, columns = height // 28 * SIDE, width // 28 * SIDE
    if shape[1] / shape[0] > columns / rows:  # bands above and below
        band = (rows - int(round(shape[0] * columns / shape[1], 7))) // 2
        rows_left, columns_left = range(band, rows - band), range(columns)
    else:
        band = (columns - int(round(shape[1] * rows / shape[0], 7))) // 2
        rows_left, columns_left = range(rows), range(band, columns - band)
    across = columns // SIDE
    return [
        [
            (1 + r // SIDE * across + c // SIDE, r % SIDE * SIDE + c % SIDE)
            for r, c in ((row, column) for column in columns_left)
        ]
        for row in rows_left
    ]


def layout_of(model, process, shapes, resample=True):
    pictures = [Image.new("RGB", (width, height)) for height, width in shapes]
    inputs = process(*["<image>"] * len(shapes), images=[[picture] for picture in pictures])
    return TileLayout(model, family_of(model).tiling(model, inputs), resample)


@TILED
def test_what_is_packed_lies_where_its_token_lies(model, process):
    layout = layout_of(model, process, SHAPES, resample=False)
    tiles = layout.tiling.tiles
    # Every token of every tile has a number of its own.
    numbers = torch.arange(sum(tiles) * SIDE**2).float().reshape(sum(tiles), SIDE**2, 1)
    first = 0
    for shape, count, packed, tile_of in zip(
        SHAPES, tiles, layout.values(numbers + 1), layout.tile_of, strict=True
    ):
        base = [(0, token) for token in range(SIDE**2)]
        expected = [base] + [[*row, None] for row in grid_rows(model, shape)]
        cells = [cell for row in expected for cell in row]
        assert packed[:, 0].tolist() == [
            0 if cell is None else 1 + (first + cell[0]) * SIDE**2 + cell[1] for cell in cells
        ]
        assert tile_of.tolist() == [ROW_END if cell is None else cell[0] for cell in cells]
        first += count


@pytest.mark.parametrize("family", ["llava_onevision"])
@pytest.mark.parametrize("shape", [(56, 56), (50, 41), (84, 50), (84, 56)])
def test_values_of_a_shrunk_image_are_resampled_by_hand_too(model, process, shape):
    layout = layout_of(model, process, [shape])
    scores = torch.randn(sum(layout.tiling.tiles), SIDE**2, 1, generator=torch.Generator().manual_seed(0))
    rows = grid_rows(model, shape)
    ratio = (len(rows) * len(rows[0]) / (2 * SIDE**2)) ** 0.5
    assert ratio > 1.1
    height, width = int(len(rows) // ratio), int(len(rows[0]) // ratio)
    expected, tiles = [], []
    for y in range(height):
        for x in range(width):
            value, weight_of = 0.0, {}
            for cell, weight in neighbours(
                rows, (y + 0.5) * len(rows) / height, (x + 0.5) * len(rows[0]) / width
            ):
                value += weight * scores[cell].item()
                weight_of[cell[0]] = weight_of.get(cell[0], 0) + weight
            expected.append(value)
            tiles.append(weight_of)
        expected.append(0.0)
        tiles.append({ROW_END: 1.0})
    [packed], [tile_of] = layout.values(scores), layout.tile_of
    torch.testing.assert_close(packed[SIDE**2 :, 0], torch.tensor(expected), atol=1e-5, rtol=0)
    assert (tile_of[: SIDE**2] == 0).all()
    for tile, weight_of in zip(tile_of[SIDE**2 :].tolist(), tiles, strict=True):
        assert weight_of[tile] >= max(weight_of.values()) - 1e-5


def neighbours(rows, y, x):
    """The cells that a point between them is mixed of, each with its weight."""
    for row, down in ends(y, len(rows)):
        for column, right in ends(x, len(rows[0])):
            yield rows[row][column], down * right


def ends(at, count):
    low = min(max(at - 0.5, 0), count - 1)
    below = min(int(low), count - 1)
    return (below, 1 - (low - below)), (min(below + 1, count - 1), low - below)


@TILED
@pytest.mark.parametrize("resample", [True, False])
def test_tokens_that_share_a_budget_are_all_and_nothing_else(model, process, resample):
    layout = layout_of(model, process, SHAPES, resample)
    for budget in ("image", "tile"):
        for parts, tile_of in zip(layout.groups(budget), layout.tile_of, strict=True):
            everything = torch.cat(parts).sort().values
            assert torch.equal(everything, (tile_of != ROW_END).nonzero()[:, 0])
    for parts, tile_of, tiles in zip(layout.groups("tile"), layout.tile_of, layout.tiling.tiles, strict=True):
        assert len(parts) == tiles
        assert all((tile_of[part] == tile).all() for tile, part in enumerate(parts))


@TILED
def test_a_newline_stays_or_follows_its_row(model, process):
    layout = layout_of(model, process, [(56, 56), (20, 60)], resample=False)
    for image, shape in enumerate([(56, 56), (20, 60)]):
        rows = grid_rows(model, shape)
        starts = [SIDE**2 + row * (len(rows[0]) + 1) for row in range(len(rows))]
        ends_of_rows = [start + len(rows[0]) for start in starts]
        none = [torch.empty(0, dtype=torch.int64)] * 2
        for kept, used in (
            ([], []),
            ([0, 5, 15], []),  # of the whole image, which has no rows
            ([starts[0]], [0]),
            ([3, starts[1] + 2, starts[1] + 3, ends_of_rows[-1] - 1], [1, len(rows) - 1]),
        ):
            given = [torch.tensor(kept, dtype=torch.int64) if i == image else none[i] for i in range(2)]
            follow, keep = (layout.with_newlines(given, rule)[image] for rule in ("follow", "keep"))
            assert follow.tolist() == sorted([*kept, *(ends_of_rows[row] for row in used)])
            assert keep.tolist() == sorted([*kept, *ends_of_rows])


@TILED
def test_the_one_newline_of_a_single_tile_follows_its_tokens(model):
    layout = TileLayout(model, Tiling.of_one_grid((1, 1), (SIDE, SIDE)))
    assert [tile_of.tolist() for tile_of in layout.tile_of] == [[0] * 16 + [ROW_END]] * 2
    follow = layout.with_newlines([torch.tensor([2, 7]), torch.tensor([], dtype=torch.int64)], "follow")
    assert [stay.tolist() for stay in follow] == [[2, 7, 16], []]


def test_without_rows_there_is_no_newline(model):
    layout = TileLayout(model, Tiling.of_one_grid((1,), (SIDE, SIDE)))
    for rule in ("keep", "follow"):
        assert layout.with_newlines([torch.tensor([1, 3])], rule)[0].tolist() == [1, 3]
    assert layout.lengths == [16]
