"""The grid cut into rectangles, against a literal transcription in exact fractions."""

import itertools
import math
from fractions import Fraction

import pytest

from atr.reduction.rectangles import rectangles

GRIDS = [*itertools.product(range(1, 7), range(1, 7)), (3, 17), (17, 3)]


def literal_rectangles(rows, columns, count):
    """(top, bottom, left, right) band by band in exact fractions, and whether none of these is a half."""
    exact = []

    def bound(cells, part, parts):
        exact.append(Fraction(cells * part, parts))
        return math.floor(exact[-1] + Fraction(1, 2))

    bands = round(math.sqrt(count * rows / columns))
    while bands == 0 or math.ceil(Fraction(rows, bands)) * count > rows * columns:
        bands += 1
    cut = []
    for top, bottom in itertools.pairwise(bound(rows, band, bands) for band in range(bands + 1)):
        parts = bound(count, bottom, rows) - bound(count, top, rows)
        for left, right in itertools.pairwise(bound(columns, part, parts) for part in range(parts + 1)):
            cut.append((top, bottom, left, right))
    return cut, all(value.denominator != 2 for value in exact)


@pytest.mark.parametrize("grid", GRIDS)
def test_rectangles_are_a_partition_into_nearly_equal_areas(grid):
    tokens = grid[0] * grid[1]
    for count in range(1, tokens + 1):
        cut = rectangles(grid, count).tolist()
        covered = [
            (row, column)
            for top, bottom, left, right in cut
            for row in range(top, bottom)
            for column in range(left, right)
        ]
        assert len(cut) == count and sorted(covered) == list(itertools.product(*map(range, grid)))
        areas = [(bottom - top) * (right - left) for top, bottom, left, right in cut]
        assert min(areas) > 0 and max(areas) * count < 2 * tokens and max(areas) <= 4 * min(areas)


@pytest.mark.parametrize("grid", GRIDS)
def test_rectangles_are_the_literal_ones_and_symmetric(grid):
    rows, columns = grid
    for count in range(1, rows * columns + 1):
        cut = {tuple(bounds) for bounds in rectangles(grid, count).tolist()}
        turned = {bounds[2:] + bounds[:2] for bounds in cut}
        literal, symmetric = literal_rectangles(*sorted(grid), count)
        assert set(literal) == (turned if rows > columns else cut)
        mirrored = {
            (rows - bottom, rows - top, columns - right, columns - left) for top, bottom, left, right in cut
        }
        assert not symmetric or mirrored == cut
