import io

import numpy as np
import pytest
from PIL import Image

from atr.reporting import heatmaps
from atr.reporting.intrinsic import OverlapMatrix
from atr.reporting.paired import Difference, PairedDifferences
from atr.reporting.results import Comparison, ScorePoint


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def test_wins_and_losses_are_coloured_and_missing_cells_are_empty():
    comparison = Comparison("group", "text", ScorePoint(1, 9, 9, 1, 1, 1), None, {})
    win, tie, loss = Difference(0.3, 0.2, 0.4), Difference(0.1, -0.1, 0.3), Difference(-0.3, -0.4, -0.2)

    def tinted(others):
        """Pixels of a green and of a purple cast."""
        png = pixels(heatmaps.draw_differences(PairedDifferences(comparison, "ours", others)))
        green, purple = png[..., 1] - png[..., 0], png[..., 0] - png[..., 1]
        return (green > 20).sum(), (purple > 20).sum()

    assert tinted({"a": {0.3: tie, 0.5: tie}}) == (0, 0)
    green, purple = tinted({"a": {0.3: win, 0.5: tie}, "b": {0.5: loss}})
    assert green > 1000 and purple > 1000
    assert tinted({"a": {0.3: win, 0.5: win}, "b": {0.5: loss}})[0] == pytest.approx(2 * green, rel=0.1)


def test_overlap_is_the_darker_the_larger():
    png = pixels(heatmaps.draw_overlap(OverlapMatrix(0.4, ["a", "b"], [[1.0, 0.1], [0.1, 1.0]])))
    dark = (png[..., 1] - png[..., 0] > 40) & (png[..., 1] < 100)
    light = (png[..., 1] > 230) & (png[..., 1] - png[..., 0] > 5)
    assert dark.sum() == pytest.approx(light.sum(), rel=0.3) and dark.sum() > 1000
