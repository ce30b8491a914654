"""Stages extract, pretrain and evaluate on a model of native resolution, with images that it refuses."""

import re
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
from lightning.pytorch.loggers.logger import DummyLogger
from PIL import Image

from atr import config
from atr.core.answer_files import load_rows
from atr.core.files import read_json
from atr.core.records import Question
from atr.datasets.prepared import save_images
from atr.datasets.questions import save_questions
from atr.features.preprocess import probe_image
from atr.features.store import FeatureStore
from atr.reduction import FeatureSelector
from atr.stages import (
    EVALUATE,
    EVALUATE_IMAGES,
    PRETRAIN,
    PRETRAIN_FEATURES,
    PRETRAIN_IMAGES,
    SELECTOR,
    evaluate,
    extract,
    pretrain,
)

ROOT = Path(__file__).parents[2]
CHANGES = {
    "encoder": "./vlm", "vlm": "./vlm", "accelerator": "cpu", "precision": "32-true", "workers": 0,
    "epochs": 1, "batch_size": 2, "heads": 2, "collapse_after": 1.0, "validation": 0.25, "mask_images": 1,
    "keep": 0.5, "bootstrap": 2, "random_seeds": 1, "max_new_tokens": 2,
    "min_pixels": 1024, "max_pixels": 1600,
}  # fmt: skip
SIZES = [(24, 18), (18, 40), (64, 16), (50, 48), (1, 1), (30, 30), (1, 3), (40, 40)]
WIDTH = 32
"""Channels of a merged token, and of a patch."""
EXTREME = (402, 2)
TOLD = "absolute aspect ratio must be smaller than 200, got 201.0"
PREPARED = {"seed": 0, "prepare": {"source": "coco", "prompts": []}}


@pytest.fixture
def project(checkpoints, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    log = SimpleNamespace(metrics=lambda *_: None, artifact=lambda *_, **__: None, logger=DummyLogger)
    monkeypatch.setattr("atr.core.tracking.run", lambda *_, **__: nullcontext(log))
    checkpoints.write(tmp_path / "vlm", "qwen2_5_vl")
    write_params()
    prepare(SIZES)


def write_params(**changes):
    text = (ROOT / "params.yaml").read_text()
    for key, value in (CHANGES | changes).items():
        text, count = re.subn(rf"^( *{key}: )[^\[\n]*$", rf"\g<1>{value}", text, flags=re.MULTILINE)
        assert count, key
    text = re.sub(r"^  keep: \[.*\]$", "  keep: [0.5]", text, flags=re.MULTILINE)
    Path("params.yaml").write_text(text)


def prepare(sizes):
    """Images of these sizes, with a question about each."""
    images = [(f"docs/{place}", draw(size)) for place, size in enumerate(sizes)]
    for folder in (PRETRAIN_IMAGES, EVALUATE_IMAGES):
        folder.mkdir(parents=True, exist_ok=True)
        save_images(folder, images, PREPARED)
    save_questions(
        EVALUATE_IMAGES, (Question(name, "docs", "text", [name], "w10", ["w11"]) for name, _ in images)
    )


def draw(size):
    return probe_image(*size) if min(size) > 2 else Image.new("RGB", size, (90, 160, 20))


@pytest.mark.parametrize("layer", ["merged", 1])
def test_a_selector_of_a_layer_is_trained_and_evaluated(project, layer):
    write_params(layer=layer)
    extract.main(config.load("extract"), "pretrain")
    store = FeatureStore.open(PRETRAIN_FEATURES)
    assert (store.manifest["layer"], store.width, len(store)) == (layer, WIDTH, len(SIZES))
    assert store.manifest["resolved"]["pixels"] == {"min_pixels": 1024, "max_pixels": 1600}
    pretrain.main(config.load("pretrain"))
    trained = read_json(PRETRAIN / "metrics.json")["resolved"]["features"]
    assert trained["pixels"] == store.manifest["resolved"]["pixels"]
    selector = FeatureSelector.from_pretrained(SELECTOR)
    assert (selector.layer, selector.trunk.width, selector.is_ragged) == (layer, WIDTH, True)
    evaluate.main(config.load("evaluate"), "selector")
    rows = load_rows(EVALUATE / "selector" / "results.jsonl")
    assert [row.status for row in rows] == ["answered"] * len(SIZES)
    assert all(row.tokens == int(0.5 * row.tokens_full + 0.5) for row in rows)


def test_an_image_that_the_processor_refuses_is_named_before_any_is_encoded(project):
    prepare([*SIZES, EXTREME])
    with pytest.raises(ValueError, match=f"^image docs/8: 402 x 2 pixels: {re.escape(TOLD)}$"):
        extract.main(config.load("extract"), "pretrain")
    assert not PRETRAIN_FEATURES.exists()


def test_a_question_about_an_image_that_the_processor_refuses_fails_alone(project):
    prepare([*SIZES, EXTREME])
    evaluate.main(config.load("evaluate"), "full")
    rows = load_rows(EVALUATE / "full" / "results.jsonl")
    assert [row.status for row in rows] == ["answered"] * len(SIZES) + ["failed"]
    assert TOLD in rows[-1].error


@pytest.mark.parametrize(
    ("trained", "told"),
    [
        (3, "layer 3 .*; the tower of ./vlm has layers 1 to 2"),
        ("merged", "layer merged .* of width 24; ./vlm has width 32 there"),
    ],
)
def test_a_selector_of_another_layer_is_refused_by_name(project, trained, told):
    FeatureSelector(24, (4, 4), layers=1, heads=2, layer=trained, encoder="./vlm").save_pretrained(SELECTOR)
    with pytest.raises(ValueError, match=told):
        evaluate.main(config.load("evaluate"), "selector")
