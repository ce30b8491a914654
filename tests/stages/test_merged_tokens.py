"""Every stage of the overlays of Qwen2.5-VL and Qwen3-VL in turn, on tiny random checkpoints.

Images have sizes of their own, so that their numbers of tokens differ. A third project has the overlay of
Qwen3-VL, but a model that cuts images into tiles.
"""

import io
import json
import runpy
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
from PIL import Image

from atr import config
from atr.cli import overlay, plan
from atr.core.answer_files import load_rows
from atr.core.files import read_json
from atr.datasets import PreparedImages
from atr.features.store import FeatureStore
from atr.stages import EVALUATE_FEATURES, EVALUATE_IMAGES, PRETRAIN_FEATURES

ROOT = Path(__file__).parents[2]
CHECKPOINTS = ROOT / "tests/checkpoints.py"
OVERLAYS = {"qwen2_5_vl": "qwen2.5-vl", "qwen3_vl": "qwen3-vl", "idefics3": "qwen3-vl"}
TILED = ("idefics3",)
SETTINGS = (
    "encoder=./vlm", "vlm=./vlm", "prepare.repository=./hub", "trainer.accelerator=cpu",
    "trainer.precision=32-true", "prepare.images=12", "prepare.questions=4", "extract.batch_size=4",
    "extract.shard_images=8", "extract.workers=0", "pretrain.heads=4", "pretrain.epochs=1",
    "pretrain.batch_size=4", "pretrain.validation=0.25", "pretrain.collapse_after=1.0",
    "pretrain.mask_images=2", "distill.heads=4", "distill.images=12", "distill.validation=0.25",
    "distill.max_new_tokens=3", "evaluate.max_new_tokens=3", "evaluate.bootstrap=20", "intrinsic.images=6",
    "intrinsic.batch_size=4", "intrinsic.pretrain_images=12", "latency.batches=[1, 2]",
    "latency.seconds=0.001", "robustness.questions=1",
)  # fmt: skip
"""Of the machine and of the sizes; all else is as the overlay has it."""
BOUNDS = ("min_pixels=1024", "max_pixels=1600")
"""16 to 25 tokens of 8 x 8 pixels."""
WITHOUT_BOUNDS = (
    "min_pixels=null", "max_pixels=null", "evaluate.reducers=[full, none, random]",
    "evaluate.selectors=[selector, selector_adaptive]", "evaluate.distilled=[distilled]",
)  # fmt: skip
"""Tiles have one size, and selector_mmr cannot compare tokens between them."""
KEEP = (0.1, 0.25)
COUNTED = ("random", "selector", "distilled")
"""Reducers whose counts are checked image by image."""
SHAPES = ((24, 18), (18, 40), (64, 16), (50, 48))
"""(width, height) of the images in turn."""
NO_IMAGE = {
    "id": "validation_Math_4", "question": "How much is 2 + 2?", "options": "[]", "answer": "4",
    "question_type": "open",
}  # fmt: skip


def settings_of(family):
    return (*SETTINGS, *(WITHOUT_BOUNDS if family in TILED else BOUNDS))


@pytest.fixture(scope="module", params=OVERLAYS)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def project(family, hub, run_overlay, tmp_path_factory):
    """A project in which the whole pipeline has run under one of the overlays."""
    folder = tmp_path_factory.mktemp(family)
    for name, (_, _, rows) in hub.DATASETS.items():
        asked = [*rows, NO_IMAGE] if name == "mmmu" else rows
        hub.write(folder / "hub", name, [reshaped(row, place) for place, row in enumerate(asked)])
    runpy.run_path(str(CHECKPOINTS))["write"](folder / "vlm", family)
    run_overlay(folder, OVERLAYS[family], settings_of(family))
    return folder


def reshaped(row, place):
    """A row of a dataset whose images have shapes of their own."""
    cells = {
        key: value
        for key, value in row.items()
        if key.startswith("image") and not key.endswith(("Id", "_id"))
    }
    return row | {
        key: {**value, "bytes": stretched(value["bytes"], place + number)}
        if isinstance(value, dict)
        else stretched(value, place + number)
        for number, (key, value) in enumerate(cells.items())
    }


def stretched(content, place):
    buffer = io.BytesIO()
    Image.open(io.BytesIO(content)).resize(SHAPES[place % len(SHAPES)]).save(buffer, format="png")
    return buffer.getvalue()


@pytest.fixture(autouse=True)
def inside(project, monkeypatch):
    monkeypatch.chdir(project)


def reducers():
    return config.load("report").evaluate.names


def results(reducer):
    folder = Path("experiments/evaluate") / reducer
    return [asdict(row) for row in load_rows(folder / "results.jsonl")], read_json(folder / "summary.json")


def tokens_of_images():
    """Number of tokens of each held-out image of a model of native resolution, by the plan's rule."""
    images = PreparedImages(EVALUATE_IMAGES)
    resolution = plan.load_plan().resolution
    return {
        name: resolution.tokens(*image.size) for name, image in map(images.__getitem__, range(len(images)))
    }


@pytest.mark.exhaustive
@pytest.mark.timeout(900)
def test_every_parameter_but_sizes_is_the_overlays(family, tmp_path):
    shutil.copy(ROOT / "params.yaml", tmp_path)
    overlay.apply(ROOT / "experiments" / f"{OVERLAYS[family]}.yaml", path=tmp_path / "params.yaml")
    written = config.flat(tmp_path / "params.yaml")
    changed = {key for key, value in config.flat().items() if value != written[key]}
    assert changed <= {setting.partition("=")[0] for setting in settings_of(family)}


@pytest.mark.exhaustive
@pytest.mark.timeout(900)
def test_every_question_is_answered_by_every_reducer(family):
    full, summary = results("full")
    assert {row["benchmark"] for row in full} == set(config.load("prepare").prepare.benchmarks)
    assert {len(row["images"]) for row in full if row["benchmark"] == "mmmu"} == {0, 1, 3}
    of = {row["id"]: row["tokens_full"] for row in full}
    assert len(set(of.values())) > 3, "numbers of tokens differ"
    draws = {"full": 1, "none": 1, "selector_adaptive": 1, "random": 2 * len(KEEP)}
    assert set(draws) < set(reducers())
    for reducer in reducers():
        rows, own = results(reducer)
        assert [row["status"] for row in rows] == ["answered"] * len(of) * draws.get(reducer, len(KEEP))
        assert {row["id"]: row["tokens_full"] for row in rows} == of
        assert own["tokens_full"] == summary["tokens_full"] == sum(of.values()) / len(of)


@pytest.mark.exhaustive
@pytest.mark.timeout(900)
def test_what_is_kept_is_the_asked_fraction_of_each_image(family):
    if family in TILED:
        for reducer in COUNTED:
            for row in results(reducer)[0]:
                assert row["tokens_full"] % 9 == 0 and row["tokens"] == row["tokens_fed"]
                if len(row["images"]) == 1:
                    assert row["tokens"] == max(1, int(row["keep"] * row["tokens_full"] + 0.5))
        return
    tokens = tokens_of_images()
    assert set(tokens.values()) <= set(range(16, 26)) and len(set(tokens.values())) > 2
    for reducer in COUNTED:
        for row in results(reducer)[0]:
            sizes = [tokens[image] for image in row["images"]]
            assert row["tokens_full"] == sum(sizes)
            assert row["tokens"] == row["tokens_fed"] == sum(int(row["keep"] * size + 0.5) for size in sizes)


@pytest.mark.exhaustive
@pytest.mark.timeout(900)
def test_stored_features_are_as_many_as_the_plan_counts(family):
    shape = plan.load_plan().features
    for folder in (PRETRAIN_FEATURES, EVALUATE_FEATURES):
        store = FeatureStore.open(folder, {"encoder": "./vlm"})
        assert store.manifest["layer"] == "merged"
        if family in TILED:
            assert {tuple(store[place].shape) for place in range(len(store))} == {(9, 32)}
        else:
            assert {store[place].shape[-1] for place in range(len(store))} == {shape.width}
    if family not in TILED:
        tokens = tokens_of_images()
        assert {name: len(store[place]) for place, name in enumerate(store.ids)} == tokens


@pytest.mark.exhaustive
@pytest.mark.timeout(900)
def test_selectors_know_the_tokens_that_they_rank(family):
    for stage in ("pretrain", "distill"):
        settings = json.loads(Path(f"experiments/{stage}/selector/config.json").read_text())
        assert (settings["layer"], settings["width"]) == ("merged", 32)


@pytest.mark.exhaustive
@pytest.mark.timeout(900)
def test_every_result_file_is_there_and_the_report_shows_them():
    for result in (
        "pretrain/metrics",
        "distill/metrics",
        "reconstructor/metrics",
        "intrinsic/selector/metrics",
        "latency/selector/metrics",
        "latency/prefill/metrics",
        "robustness/distilled/metrics",
    ):
        assert read_json(Path(f"experiments/{result}.json"))
    page = Path("experiments/report/report.html").read_text()
    assert "./vlm" in page and all(name in page for name in (*reducers(), "ocrbench"))
