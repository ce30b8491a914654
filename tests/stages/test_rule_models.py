"""Stages distill and evaluate on models of the rule: images of native resolution, or cut into tiles."""

import json
import re
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger

from atr import config
from atr.core.answer_files import load_rows
from atr.core.files import read_json
from atr.datasets import PreparedImages
from atr.features.store import RaggedShardWriter, write_manifest
from atr.reduction import FeatureSelector
from atr.stages import (
    DISTILL,
    DISTILLED,
    EVALUATE,
    PRETRAIN_FEATURES,
    PRETRAIN_IMAGES,
    SELECTOR,
    distill,
    evaluate,
    prepare,
)
from atr.vlm.checkpoint import load_vlm
from atr.vlm.inputs import ImageInputs

ROOT = Path(__file__).parents[2]
CHANGES = {
    "accelerator": "cpu", "images": 8, "questions": 1, "epochs": 1, "batch_size": 2, "layers": 1, "heads": 2,
    "max_new_tokens": 2, "bootstrap": 2, "random_seeds": 1,
}  # fmt: skip
TYPES = ["qwen2_5_vl", pytest.param("idefics3", marks=pytest.mark.exhaustive)]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A few images and questions of the micro world."""
    folder = tmp_path_factory.mktemp("prepared")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_params("micro", "micro")
        patch.setattr("atr.core.tracking.run", unlogged)
        prepare.main(config.load("prepare"))
    return folder


def unlogged(*_, **__):
    log = SimpleNamespace(metrics=lambda *_: None, artifact=lambda *_, **__: None, logger=DummyLogger)
    return nullcontext(log)


def write_params(encoder, vlm):
    text = (ROOT / "params.yaml").read_text()
    for key, value in (CHANGES).items():
        text, count = re.subn(rf"^( +{key}: ).*$", rf"\g<1>{value}", text, flags=re.MULTILINE)
        assert count, key
    text = re.sub(r"^  keep: \[.*\]$", "  keep: [0.5]", text, flags=re.MULTILINE)
    text = re.sub(r"^encoder: \S+", f"encoder: {encoder}", text, flags=re.MULTILINE)
    text = re.sub(r"^vlm: \S+", f"vlm: {vlm}", text, flags=re.MULTILINE)
    Path("params.yaml").write_text(text)


@pytest.fixture(params=TYPES)
def project(request, prepared, checkpoints, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("atr.core.tracking.run", unlogged)
    Path("data").mkdir()
    Path("data/prepared").symlink_to(prepared / "data/prepared")
    checkpoints.write(tmp_path / "vlm", request.param)
    write_params("./vlm", "./vlm")
    save_merged_features()
    return request.param


def save_merged_features():
    """The merged tokens of each whole image, as the extract stage stores them."""
    model, processor = load_vlm("./vlm", torch.float32)
    images = PreparedImages(PRETRAIN_IMAGES)
    source = ImageInputs(model, processor, images)
    PRETRAIN_FEATURES.mkdir(parents=True)
    writer = RaggedShardWriter(PRETRAIN_FEATURES, len(images), shard_images=8)
    for place, name in enumerate(images.ids):
        with torch.inference_mode():
            prepared = source.prepare([[name]], ["total"])
        tile = prepared.layout.tiling.grids[-1]
        features_ND = prepared.encoded.value("features_BND")[-1]
        writer.add(place, [name], [features_ND], [tile])
    write_manifest(
        PRETRAIN_FEATURES,
        encoder="./vlm",
        layer="merged",
        grid=None,
        width=32,
        parameters={"encoder": "./vlm"},
        shards=writer.shards,
        resolved={},
    )


def test_a_selector_is_distilled_from_merged_tokens_and_evaluated(project):
    distill.main(config.load("distill"))
    selector = FeatureSelector.from_pretrained(DISTILLED)
    assert selector.layer == "merged" and selector.trunk.width == 32 and selector.is_taught
    assert read_json(DISTILL / "metrics.json")["final"]["validation/divergence_0.5"] > 0
    for reducer in ("full", "distilled", "random"):
        evaluate.main(config.load("evaluate"), reducer)
        rows = load_rows(EVALUATE / reducer / "results.jsonl")
        assert rows and {row.status for row in rows} == {"answered"}
        kept = {row.tokens / row.tokens_full for row in rows if row.tokens_full}
        assert all(0.4 < fraction < 0.6 for fraction in kept) if reducer != "full" else kept == {1.0}
    masks = json.loads((EVALUATE / "distilled" / "masks.json").read_text())
    assert masks["masks"] and (masks.get("grid") == [3, 3] or project == "qwen2_5_vl")


@pytest.mark.parametrize("project", ["qwen2_5_vl"], indirect=True)
def test_a_reducer_between_layers_is_refused_by_name(project):
    with pytest.raises(ValueError, match=rf"^reducer fastv .* not supported for {project}, allowed: llava"):
        evaluate.main(config.load("evaluate"), "fastv")


@pytest.mark.parametrize("project", ["qwen2_5_vl"], indirect=True)
def test_a_selector_of_another_width_is_refused(project):
    FeatureSelector(16, (4, 4), layers=1, heads=2, layer="merged", encoder="other").save_pretrained(SELECTOR)
    with pytest.raises(ValueError, match=r"layer merged of encoder other, features of width 16; .* width 32"):
        evaluate.main(config.load("evaluate"), "selector")


@pytest.mark.parametrize("project", ["gemma3"], indirect=True)
def test_a_model_that_cannot_teach_is_refused_before_the_store_is_read(project):
    for file in PRETRAIN_FEATURES.iterdir():
        file.unlink()
    with pytest.raises(ValueError, match=r"^distill: gemma3 cannot teach: the cache of gemma3_text has"):
        distill.main(config.load("distill"))
