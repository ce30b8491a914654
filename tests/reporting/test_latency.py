import pytest

from atr.reporting.latency import PrefillTime, SelectionTime, load_latency

NAMES = ("selector", "random")


@pytest.fixture
def folder(synthetic, tmp_path):
    """The folder of stages latency and prefill."""
    synthetic.write_latency(tmp_path, NAMES)
    return tmp_path


def test_without_a_timed_reducer_there_are_no_results(folder, tmp_path):
    assert load_latency(tmp_path / "nowhere", NAMES) is None
    assert load_latency(folder, ("full", "dart")) is None


def test_times_are_read_and_what_prefill_saves(folder):
    read = load_latency(folder, ("full", *NAMES))
    assert read.device == "cpu" and len(read.entries) == 8
    assert list(read.sources) == ["latency selector", "latency random", "prefill"]
    assert read.entries[0] == SelectionTime("selector", 144, 14, 1, 3.5)
    assert read.prefill[0] == PrefillTime(14, 1, 24.0)
    assert read.prefill_saved(read.entries[0]) == 130.0
    assert read.prefill_saved(SelectionTime("selector", 144, 14, 32, 1.0)) == 130.0 / 32
    assert read.prefill_saved(SelectionTime("selector", 144, 15, 1, 1.0)) is None
    assert read.prefill_saved(SelectionTime("selector", 144, 14, 8, 1.0)) is None


def test_without_prefill_times_nothing_is_known_to_be_saved(folder):
    (folder / "prefill/metrics.json").unlink()
    read = load_latency(folder, NAMES)
    assert {read.prefill_saved(entry) for entry in read.entries} == {None}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda content: content.pop("device"), "device is missing"),
        (lambda content: content["entries"][0].pop("kept"), r"entries\[0\]: kept is missing"),
        (
            lambda content: content["entries"][0].update(reducer="../a"),
            "entries: reducer '../a' is not allowed",
        ),
        (lambda content: content["entries"][0].update(milliseconds="1"), "milliseconds: '1' is not allowed"),
        (lambda content: content.update(seconds=1), "'seconds' is an unknown key"),
    ],
)
def test_a_wrong_cell_is_named_with_what_is_wrong(folder, change, spoil, message):
    path = folder / "random/metrics.json"
    change(path, spoil)
    with pytest.raises(
        ValueError, match=rf"{path}: .*{message}.*; stage latency \(reducer random\) writes it"
    ):
        load_latency(folder, NAMES)


def test_a_wrong_prefill_file_is_named_with_its_stage(folder, change):
    path = folder / "prefill/metrics.json"
    change(path, lambda content: content["prefill"][1].pop("tokens"))
    with pytest.raises(
        ValueError, match=rf"{path}: prefill\[1\]: tokens is missing.*; stage prefill writes it"
    ):
        load_latency(folder, NAMES)


@pytest.mark.parametrize("name", ["random", "prefill"])
@pytest.mark.parametrize(
    ("spoil", "key"),
    [
        (lambda content: content.update(device="a card"), "device"),
        (lambda content: content["resolved"]["vlm"].update(digest="another"), "resolved.vlm.digest"),
    ],
)
def test_times_of_different_machines_or_models_are_refused(folder, change, name, spoil, key):
    path = folder / name / "metrics.json"
    change(path, spoil)
    with pytest.raises(ValueError, match=f"{path}: {key}: .* is not allowed, allowed: .*, as in .*selector"):
        load_latency(folder, NAMES)


def test_selections_timed_with_other_parameters_are_refused(folder, change):
    path = folder / "random/metrics.json"
    change(path, lambda content: content["parameters"]["latency"].update(seconds=9))
    with pytest.raises(ValueError, match=f"{path}: latency.seconds: 9 is not allowed, allowed: 5"):
        load_latency(folder, NAMES)
