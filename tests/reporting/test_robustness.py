import io

import pytest
from PIL import Image

from atr.reporting.robustness import SAME, Change, Overlap, figure, load_robustness, tables

NAMES = ("distilled", "selector")


@pytest.fixture
def robustness(synthetic, tmp_path):
    """A file of stage robustness."""
    path = tmp_path / "robustness/metrics.json"
    synthetic.write_robustness(path, NAMES)
    return path


def test_what_was_not_measured_is_nothing(tmp_path):
    assert load_robustness(tmp_path / "metrics.json") is None


def test_what_was_measured_is_read(robustness):
    read = load_robustness(robustness)
    assert (read.keep, read.questions, read.photographs, read.full) == ([0.3, 0.5], 120, 12, 0.95)
    jpeg, resized = read.variants
    assert (jpeg.name, jpeg.no_pixel_changed, resized.no_pixel_changed) == ("JPEG 75", False, True)
    assert jpeg.reducers["selector"].iou == [Overlap(0.9, 0.75), None]
    assert jpeg.reducers["selector"].change[1] == Change(-0.0125, -0.05, 0.025)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda content: content.pop("resolved"), "resolved is missing"),
        (lambda content: content.update(seeds=3), "'seeds' is an unknown key"),
        (lambda content: content["variants"][0].pop("full"), "full is missing"),
        (lambda content: content["variants"][0]["reducers"].pop("selector"),
         "JPEG 75: reducers distilled, allowed: distilled, selector"),
        (lambda content: content["variants"][1]["reducers"]["selector"]["change"].pop(),
         "bilinear.selector.change has 1 values, allowed: 2"),
        (lambda content: content["reference"]["selector"].pop(), "reference.selector has 1 values"),
        (lambda content: content["variants"][0]["reducers"]["selector"]["iou"][0].pop("lowest"),
         "lowest is missing"),
        (lambda content: content["variants"][0]["full"].update(mean="0.1"), "mean: '0.1' is not allowed"),
        (lambda content: content["reference"]["selector"].__setitem__(0, float("nan")), "nan is not allowed"),
        (lambda content: content["reference"].update({"../../x": [0.1, 0.2]}), "'../../x' is no name"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_named_with_what_is_wrong(robustness, change, spoil, message):
    change(robustness, spoil)
    with pytest.raises(ValueError, match=f"{robustness}: .*{message}.*; stage robustness makes it"):
        load_robustness(robustness)


def test_the_tables_have_a_row_a_deployment_and_a_column_a_reducer_and_fraction(robustness):
    overlap, photographs, points = tables(load_robustness(robustness))
    columns = ["distilled 0.3", "distilled 0.5", "selector 0.3", "selector 0.5"]
    assert overlap.header == photographs.header == ["deployment", *columns]
    assert overlap.blocks == [
        [["JPEG 75", *["0.900 (0.75)", "—"] * 2], ["bilinear", *[SAME] * 4]],
    ]
    assert photographs.blocks[0][1] == ["bilinear", *["0.800 (0.50)"] * 4]
    assert points.header == ["deployment", "all tokens", *columns]
    assert points.blocks[0] == [["reference, %", "95.0", *["90.0", "92.5"] * 2]]
    assert points.blocks[1][0] == ["JPEG 75", "+0.0 [+0.0, +0.0]", *["-1.2 [-5.0, +2.5]"] * 4]


def test_the_figure_is_the_same_twice_and_grows_with_the_deployments(robustness, change):
    read = load_robustness(robustness)
    png = figure(read, "distilled")
    assert figure(read, "distilled") == png
    width, height = Image.open(io.BytesIO(png)).size
    change(robustness, lambda content: content["variants"].extend(content["variants"]))
    assert Image.open(io.BytesIO(figure(load_robustness(robustness), "distilled"))).size[1] > height
    assert width > 1000
