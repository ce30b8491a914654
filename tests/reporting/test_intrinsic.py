from itertools import product
from statistics import fmean

import pytest

from atr.reporting.intrinsic import (
    IntrinsicCurves,
    MaskIndices,
    load_intrinsic,
    overlap_matrix,
)

NAMES = ("selector", "random", "dart")


@pytest.fixture
def cells(synthetic, tmp_path):
    """The folder of stage intrinsic and its cells by reducer."""
    return tmp_path, synthetic.write_intrinsic(tmp_path, NAMES)


def test_without_cells_there_are_no_results(tmp_path, synthetic):
    assert load_intrinsic(tmp_path / "intrinsic", NAMES) is None
    synthetic.write_intrinsic(tmp_path, ())
    assert load_intrinsic(tmp_path, ("full", *NAMES)) is None, "full is left out"


def test_the_cells_of_the_named_reducers_are_read(cells):
    folder, content = cells
    read = load_intrinsic(folder, ("full", "random", "selector", "divprune"))
    assert read.keep == content["random"]["keep"]
    assert read.reducers == {
        name: IntrinsicCurves(**content[name]["lines"]) for name in ("random", "selector")
    }
    assert (read.overlap.keep, read.overlap.names) == (0.4, ["random", "selector"])
    assert (read.stability.seeds, read.stability.iou) == (3, content["selector"]["stability"]["iou"])
    assert load_intrinsic(folder, ("random",)).stability is None


def test_reducers_that_merge_have_no_overlap(synthetic, tmp_path):
    synthetic.write_intrinsic(tmp_path, NAMES, merging=("dart",))
    read = load_intrinsic(tmp_path, NAMES)
    assert read.overlap.names == ["selector", "random"] and list(read.reducers) == list(NAMES)
    assert load_intrinsic(tmp_path, ("dart",)).overlap is None


def test_text_coverage_may_be_unknown(cells, change):
    folder, _ = cells
    change(folder / "random/metrics.json", lambda content: content["lines"].update(text_coverage=None))
    assert load_intrinsic(folder, NAMES).reducers["random"].text_coverage is None


def test_overlap_is_the_mean_iou_over_seeds_and_images():
    one = MaskIndices(0.5, ["a", "b"], [[[0, 1], [2, 3]], [[0, 2], [1, 3]]])
    two = MaskIndices(0.5, ["a", "b"], [[[0, 1], [0, 3]]])
    matrix = overlap_matrix({"one": one, "two": two})
    assert (matrix.keep, matrix.names) == (0.5, ["one", "two"])
    # seed 0: {0,1} and {0,1}, {2,3} and {0,3}; seed 1: {0,2} and {0,1}, {1,3} and {0,3}
    between = fmean([1, 1 / 3, 1 / 3, 1 / 3])
    assert matrix.iou == [[1, pytest.approx(between)], [pytest.approx(between), 1]]


def test_overlap_of_two_random_reducers_is_by_seed():
    one = MaskIndices(0.5, ["a"], [[[0, 1]], [[2, 3]]])
    same, swapped = one, MaskIndices(0.5, ["a"], [[[2, 3]], [[0, 1]]])
    matrix = overlap_matrix({"one": one, "same": same, "swapped": swapped})
    assert matrix.iou == [[1, 1, 0], [1, 1, 0], [0, 0, 1]]


def test_overlap_is_that_of_sets(cells):
    folder, content = cells
    read = load_intrinsic(folder, NAMES).overlap
    for (row, one), (column, two) in product(enumerate(NAMES), repeat=2):
        seeds = [content[name]["masks"]["kept"] for name in (one, two)]
        pairs = zip(*(kept * 3 if len(kept) == 1 else kept for kept in seeds), strict=True)
        ratios = [
            len({*ours} & {*theirs}) / len({*ours} | {*theirs})
            for pair in pairs
            for ours, theirs in zip(*pair, strict=True)
        ]
        assert read.iou[row][column] == pytest.approx(fmean(ratios), abs=1e-14)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda content: content.pop("masks"), "masks is missing"),
        (lambda content: content.pop("keep"), "keep is missing"),
        (lambda content: content.update(keeps=[0.1]), "'keeps' is an unknown key"),
        (lambda content: content.update(lines=None), "lines: None is not allowed"),
        (lambda content: content["lines"].pop("text_coverage"), "lines: text_coverage is missing"),
        (lambda content: content["lines"]["reconstruction"].pop(), "lines.reconstruction: 8 values, allow"),
        (lambda content: content["lines"]["reconstruction"].__setitem__(0, None), "None is not allowed"),
        (lambda content: content["masks"]["images"].pop(), r"masks: kept\[0\]: 5 images, allowed: 4"),
        (lambda content: content["masks"]["kept"][0][0].append("1"), "'1' is not allowed"),
        (lambda content: content["masks"]["kept"][0][0].append(-1), "each 0 or above"),
        (lambda content: content["masks"]["kept"][0][0].clear(), "one index or more"),
        (lambda content: content["masks"]["kept"].clear(), r"masks: kept: \[\] is not allowed"),
        (lambda content: content["stability"]["iou"].pop(), "stability: iou: 8 values, allowed: 9"),
        (lambda content: content.update(reducer="random"), "reducer: 'random' is not allowed"),
    ],
)  # fmt: skip
def test_a_wrong_cell_is_named_with_what_is_wrong(cells, change, spoil, message):
    folder, _ = cells
    path = folder / "selector/metrics.json"
    change(path, spoil)
    with pytest.raises(ValueError, match=rf"{path}: .*{message}.*; stage intrinsic \(reducer selector\)"):
        load_intrinsic(folder, NAMES)


def _other_keep(content):
    content["keep"] = [keep + 0.01 for keep in content["keep"]]


@pytest.mark.parametrize(
    ("spoil", "key"),
    [
        (_other_keep, "keep"),
        (lambda content: content["masks"].update(keep=0.5), "masks.keep"),
        (lambda content: content["masks"].update(images=list("abcde")), "masks.images"),
        (lambda content: content["parameters"].update(seed=1), "seed"),
        (lambda content: content["parameters"]["intrinsic"].update(images=9), "intrinsic.images"),
        (lambda content: content["resolved"].update(precision="bf16-mixed"), "resolved.precision"),
    ],
)
def test_cells_that_disagree_are_refused_by_key(cells, change, spoil, key):
    folder, _ = cells
    change(folder / "dart/metrics.json", spoil)
    first, second = (folder / name / "metrics.json" for name in ("selector", "dart"))
    with pytest.raises(ValueError, match=f"{second}: {key}: .* is not allowed, allowed: .*, as in {first}"):
        load_intrinsic(folder, NAMES)


def test_cells_of_different_machines_are_compared(cells, change):
    folder, _ = cells
    change(folder / "dart/metrics.json", lambda content: content["resolved"].update(device="cuda"))
    assert load_intrinsic(folder, NAMES)


def test_random_reducers_must_have_as_many_seeds(cells, change):
    folder, _ = cells
    path = folder / "dart/metrics.json"
    change(path, lambda content: content["masks"].update(kept=content["masks"]["kept"] * 2))
    with pytest.raises(ValueError, match=f"{path}: seeds: 2 is not allowed, allowed: 3"):
        load_intrinsic(folder, NAMES)
