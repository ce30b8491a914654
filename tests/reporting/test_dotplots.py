import io
from dataclasses import replace

import pytest
from PIL import Image

from atr.reporting.dotplots import draw_robustness
from atr.reporting.robustness import load_robustness


@pytest.fixture
def robustness(synthetic, tmp_path):
    names = ("distilled", "selector")
    synthetic.write_robustness(tmp_path, names)
    return load_robustness(tmp_path, ("full", *names))


def test_the_figure_is_the_same_twice_and_grows_with_the_deployments(robustness):
    png = draw_robustness(robustness, "distilled")
    assert draw_robustness(robustness, "distilled") == png
    width, height = Image.open(io.BytesIO(png)).size
    twice = replace(robustness, variants=robustness.variants * 2)
    assert Image.open(io.BytesIO(draw_robustness(twice, "distilled"))).size[1] > height
    assert width > 1000


def test_without_full_there_are_no_marks_of_all_tokens(robustness):
    variants = [replace(variant, full=None) for variant in robustness.variants]
    without = replace(robustness, full=None, variants=variants)
    assert draw_robustness(without, "distilled") != draw_robustness(robustness, "distilled")
