import pytest

from atr.reporting.intrinsic import Prefill, Selection, Spent, load_intrinsic, load_latency

NAMES = ("selector", "random")


@pytest.fixture
def measure(synthetic, tmp_path):
    """A file of stage measure and what it holds."""
    path = tmp_path / "measure/metrics.json"
    return path, synthetic.write_measure(path, NAMES)


@pytest.fixture
def cost(synthetic, tmp_path):
    """A file of stage cost and what it holds."""
    path = tmp_path / "cost/cost.json"
    return path, synthetic.write_cost(path, NAMES)


def test_what_was_not_measured_is_nothing(tmp_path):
    assert load_intrinsic(tmp_path / "metrics.json") is None
    assert load_latency(tmp_path / "cost.json") is None


def test_what_was_measured_is_read(measure):
    path, content = measure
    read = load_intrinsic(path)
    assert read.keep == content["keep"]
    assert read.reducers == {name: Selection(**content["reducers"][name]) for name in NAMES}
    assert (read.overlap.keep, read.overlap.names) == (0.4, list(NAMES))
    assert read.overlap.iou == content["overlap"]["iou"]
    assert (read.stability.seeds, read.stability.iou) == (3, content["stability"]["iou"])


def test_where_text_or_other_seeds_are_not_known_there_is_none(measure, change):
    path, _ = measure

    def without(content):
        content["stability"] = content["reducers"]["random"]["text_coverage"] = None

    change(path, without)
    read = load_intrinsic(path)
    assert (read.stability, read.reducers["random"].text_coverage) == (None, None)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda content: content.pop("overlap"), "'overlap'"),
        (lambda content: content.pop("keep"), "'keep'"),
        (lambda content: content.update(keeps=[0.1]), "'keeps'"),
        (lambda content: content["reducers"]["random"].pop("text_coverage"), "'text_coverage'"),
        (lambda content: content["reducers"]["random"].update(coverage=1), "'coverage'"),
        (lambda content: content.update(reducers=[]), "'items'"),
        (lambda content: content["reducers"]["random"]["reconstruction"].pop(),
         "reducers.random.reconstruction has 8 values, allowed: 9"),
        (lambda content: content["reducers"].update({"../a": content["reducers"]["random"]}), "is no name"),
        (lambda content: content["overlap"]["names"].__setitem__(0, "a/b"), "is no name"),
        (lambda content: content["overlap"]["iou"][0].__setitem__(0, "1"), "overlap.iou of selector is '1'"),
        (lambda content: content["reducers"]["random"]["reconstruction"].__setitem__(0, None), "is None"),
        (lambda content: content["overlap"]["iou"].pop(), "overlap.iou has 1 values, allowed: 2"),
        (lambda content: content["overlap"]["iou"][1].pop(), "overlap.iou of random has 1 values"),
        (lambda content: content["stability"]["iou"].pop(), "stability.iou has 8 values, allowed: 9"),
    ],
)  # fmt: skip
def test_a_wrong_file_of_measures_is_named_with_what_is_wrong(measure, change, spoil, message):
    path, _ = measure
    change(path, spoil)
    with pytest.raises(ValueError, match=f"{path}: .*{message}.*"):
        load_intrinsic(path)


def test_costs_are_read_and_what_prefill_saves_is_told(cost):
    path, _ = cost
    read = load_latency(path)
    assert read.device == "cpu" and len(read.entries) == 8
    assert read.entries[0] == Spent("selector", 144, 14, 1, 3.5)
    assert read.prefill[0] == Prefill(14, 1, 24.0)
    assert read.saved(read.entries[0]) == 130.0
    assert read.saved(Spent("selector", 144, 14, 32, 1.0)) == 130.0 / 32
    assert read.saved(Spent("selector", 144, 15, 1, 1.0)) is None
    assert read.saved(Spent("selector", 144, 14, 8, 1.0)) is None


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda content: content.pop("prefill"), "'prefill'"),
        (lambda content: content.pop("device"), "'device'"),
        (lambda content: content["entries"][0].pop("kept"), "'kept'"),
        (lambda content: content["entries"][0].update(seconds=1), "'seconds'"),
        (lambda content: content["entries"][0].update(reducer="../a"), "is no name"),
        (lambda content: content["entries"][0].update(milliseconds="1"), "milliseconds is '1'"),
    ],
)
def test_a_wrong_file_of_costs_is_named_with_what_is_wrong(cost, change, spoil, message):
    path, _ = cost
    change(path, spoil)
    with pytest.raises(ValueError, match=f"{path}: .*{message}.*; stage cost makes it"):
        load_latency(path)
