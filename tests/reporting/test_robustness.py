import pytest

from atr.reporting.robustness import MaskOverlap, ScoreChange, load_robustness

NAMES = ("full", "distilled", "random", "selector")


@pytest.fixture
def folder(synthetic, tmp_path):
    """The folder of stage robustness."""
    synthetic.write_robustness(tmp_path, ("distilled", "selector"))
    return tmp_path


def test_without_a_reducer_there_are_no_results(folder, tmp_path):
    assert load_robustness(tmp_path / "nowhere", NAMES) is None
    assert load_robustness(folder, ("full", "random")) is None


def test_the_cells_are_merged(folder):
    read = load_robustness(folder, NAMES)
    assert (read.keep, read.questions, read.photographs, read.full) == ([0.3, 0.5], 120, 12, 0.95)
    assert list(read.reference) == ["distilled", "selector"] and list(read.cells) == ["full", *read.reference]
    jpeg, resized = read.variants
    assert (jpeg.name, jpeg.no_pixel_changed, resized.no_pixel_changed) == ("JPEG 75", False, True)
    assert list(jpeg.reducers) == ["distilled", "selector"] and jpeg.full == ScoreChange(0.0, 0.0, 0.0)
    assert jpeg.reducers["selector"].iou == [MaskOverlap(0.9, 0.75), None]
    assert jpeg.reducers["selector"].change[1] == ScoreChange(-0.0125, -0.05, 0.025)


def test_without_full_the_scores_with_all_tokens_are_unknown(folder):
    read = load_robustness(folder, ("distilled", "selector"))
    assert read.full is None and {variant.full for variant in read.variants} == {None}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda content: content.pop("resolved"), "resolved is missing"),
        (lambda content: content.update(seeds=3), "'seeds' is an unknown key"),
        (lambda content: content["variants"][0].pop("full"), "full is missing"),
        (lambda content: content["variants"][0]["reducers"].pop("selector"),
         r"variants.JPEG 75.reducers: \[\] is not allowed, allowed: \['selector'\]"),
        (lambda content: content["variants"][1]["reducers"]["selector"]["change"].pop(),
         "variants.bilinear.selector.change: 1 values, allowed: 2"),
        (lambda content: content["reference"]["selector"].pop(), "reference.selector: 1 values, allowed: 2"),
        (lambda content: content["variants"][0]["reducers"]["selector"]["iou"][0].pop("lowest"),
         "lowest is missing"),
        (lambda content: content["variants"][0]["reducers"]["selector"]["iou"][0].update(mean="0.1"),
         "mean: '0.1' is not allowed"),
        (lambda content: content["reference"]["selector"].__setitem__(0, float("nan")), "nan is not allowed"),
        (lambda content: content["reference"].update({"../../x": [0.1, 0.2]}), r"reference: \['selector', "),
    ],
)  # fmt: skip
def test_a_wrong_cell_is_named_with_what_is_wrong(folder, change, spoil, message):
    path = folder / "selector/metrics.json"
    change(path, spoil)
    with pytest.raises(ValueError, match=rf"{path}: .*{message}.*; stage robustness \(reducer selector\)"):
        load_robustness(folder, NAMES)


def test_the_cell_of_full_must_have_scores_with_all_tokens(folder, change):
    change(folder / "full/metrics.json", lambda content: content["variants"][0].update(full=None))
    with pytest.raises(ValueError, match="full: None is not allowed, allowed: a score, and its change"):
        load_robustness(folder, NAMES)


@pytest.mark.parametrize(
    ("spoil", "key"),
    [
        (lambda content: content.update(questions=60), "questions"),
        (lambda content: content["variants"][0].update(name="JPEG 80"), "variants"),
        (lambda content: content["variants"][0].update(no_pixel_changed=True), "no_pixel_changed"),
        (lambda content: content["parameters"]["robustness"].update(questions=9), "robustness.questions"),
        (lambda content: content["resolved"].update(attention="eager"), "resolved.attention"),
    ],
)
def test_cells_that_disagree_are_refused_by_key(folder, change, spoil, key):
    path = folder / "selector/metrics.json"
    change(path, spoil)
    with pytest.raises(
        ValueError, match=f"{path}: {key}: .* is not allowed, allowed: .*full/metrics.json; run"
    ):
        load_robustness(folder, NAMES)
