"""Stages pretrain, reconstructor and intrinsic on stores whose images have grids of their own."""

import json
import math
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from omegaconf import OmegaConf
from PIL import Image

from atr import config
from atr.core.tokens import budget, mask_of
from atr.features.store import FeatureStore, RaggedShardWriter, write_manifest
from atr.reduction import FeatureSelector
from atr.reduction.autoencoder import FeatureAutoencoder
from atr.reduction.losses import unexplained_variance
from atr.stages import (
    AUTOENCODER,
    EVALUATE_FEATURES,
    INTRINSIC,
    PRETRAIN_FEATURES,
    RANDOM_MASKS,
    SELECTOR,
    intrinsic,
    pretrain,
    reconstructor,
)

ROOT = Path(__file__).parents[2]
WIDTH, KEEP = 8, [0.25, 0.5]
GRIDS = [(2, 3), (5, 2), (4, 4), (1, 7), (3, 3)]
CENTRES = [(0.1, 0.1), (0.9, 0.9), (0.55, 0.2)]


class Prepared:
    """Stands in for the prepared images."""

    parameters: ClassVar = {"prepare": {"source": "micro"}}

    def __init__(self, folder, verify=True):
        pass

    def __getitem__(self, index):
        return f"docs/{index}", Image.new("RGB", (28, 42), (6 * index, 0, 0))

    def image(self, name):
        raise AssertionError("a ragged store gives no signal of pictures")


def save_store(folder, images):
    folder.mkdir(parents=True)
    writer, generator = RaggedShardWriter(folder, images, 8), torch.Generator().manual_seed(images)
    for number in range(images):
        rows, columns = GRIDS[number % len(GRIDS)]
        features_ND = torch.randn(rows * columns, WIDTH, generator=generator)
        writer.add(number, [f"docs/{number}"], [features_ND], [(rows, columns)])
    about = {"encoder": "micro", "layer": "merged", "grid": None, "width": WIDTH, "fingerprint": "0f" * 32}
    write_manifest(folder, **about, parameters={"encoder": "micro"}, shards=writer.shards)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """An empty project with ragged features; its pictures of masks."""
    monkeypatch.chdir(tmp_path)
    save_store(PRETRAIN_FEATURES, 40)
    save_store(EVALUATE_FEATURES, 10)
    params = OmegaConf.load(ROOT / "params.yaml")
    params.trainer.update({"accelerator": "cpu", "devices": 1, "precision": "32-true"})
    params.pretrain.update({"layers": 1, "heads": 2, "epochs": 2, "batch_size": 4, "validation": 0.2})
    params.pretrain.update({"collapse_after": 1.0, "mask_images": 3})
    params.evaluate.update({"keep": KEEP, "random_seeds": 2, "reducers": ["full", "none", "random"]})
    params.intrinsic.update({"images": 10, "batch_size": 4, "epochs": 1, "overlap_keep": 0.5})
    params.intrinsic.training_seeds = 2
    OmegaConf.save(params, "params.yaml")
    sizes = []

    def artifact(path, folder=None):
        if folder == "masks":
            sizes.append(Image.open(path).size)

    log = SimpleNamespace(metrics=lambda *_: None, artifact=artifact, logger=DummyLogger)
    monkeypatch.setattr("atr.core.tracking.run", lambda *_, **__: nullcontext(log))
    monkeypatch.setattr("atr.datasets.PreparedImages", Prepared)
    centres = {f"docs/{number}": CENTRES for number in range(10)}
    monkeypatch.setattr("atr.datasets.load_text_centres", lambda folder: centres)
    return sizes


def test_a_selector_is_trained_and_measured_on_images_of_grids_of_their_own(project):
    pretrain.main(config.load("pretrain"))
    reconstructor.main(config.load("reconstructor"))
    selector = FeatureSelector.from_pretrained(SELECTOR)
    assert (selector.layer, selector.grid, selector.is_ragged) == ("merged", (3, 3), True)
    assert len(project) == 2 and project[0] == project[1] and project[0][1] <= 2 * 216
    card = (SELECTOR / "README.md").read_text()
    assert "| layer | merged |" in card and "of each image, typically 3 x 3 tokens" in card
    results = measure("selector")
    store, centres = FeatureStore.open(EVALUATE_FEATURES), CENTRES
    names = results["masks"]["images"]
    assert sorted(names) == sorted(store.ids)
    (kept,) = results["masks"]["kept"]
    for name, indices in zip(names, kept, strict=True):
        rows, columns = store.grid_of(store.index(name))
        assert len(indices) == budget(0.5, rows * columns) and max(indices) < rows * columns
    net = FeatureAutoencoder.from_pretrained(AUTOENCODER)
    for place, keep in enumerate(KEEP):
        errors, covered = zip(
            *(measured_alone(net, store, name, keep, centres) for name in names), strict=True
        )
        assert results["lines"]["reconstruction"][place] == pytest.approx(sum(errors) / 10, rel=1e-4)
        assert results["lines"]["text_coverage"][place] == pytest.approx(sum(covered) / (10 * len(centres)))
    stability = results["stability"]
    assert stability["seeds"] == 2 and all(0 < value < 1 for value in stability["iou"])
    assert all(math.isfinite(value) for value in measure("random")["lines"]["reconstruction_random"])
    # Merged tokens are what the language model is fed, so that no model is needed to compare them.
    assert all(value > 0 for value in measure("divprune")["lines"]["reconstruction"])
    assert FeatureAutoencoder.from_pretrained(RANDOM_MASKS).selector.layer == "merged"


def test_a_selector_of_another_layer_than_the_held_out_features_is_refused_by_name(project):
    for folder, layer in ((AUTOENCODER, "merged"), (RANDOM_MASKS, "merged"), (SELECTOR, -2)):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"layer": layer}))
    told = f"{SELECTOR}: was trained on layer -2, allowed: merged, that of {EVALUATE_FEATURES}/manifest.json"
    with pytest.raises(ValueError, match=f"^{re.escape(told)}$"):
        intrinsic.main(config.load("intrinsic"), "selector")


def measure(reducer):
    intrinsic.main(config.load("intrinsic"), reducer)
    return json.loads((INTRINSIC / reducer / "metrics.json").read_text())


@torch.no_grad()
def measured_alone(net, store, name, keep, centres):
    """Unexplained variance and covered characters of one image."""
    place = store.index(name)
    features_1ND, (rows, columns) = store[place][None].float(), store.grid_of(place)
    keep_1K = net.selector.select(features_1ND, budget(keep, rows * columns), (rows, columns))
    restored_1ND = net.restore(features_1ND, mask_of(keep_1K, rows * columns), (rows, columns))
    error = unexplained_variance(restored_1ND, features_1ND, net.selector.standardise.variance)
    cells = [int(y * rows) * columns + int(x * columns) for x, y in centres]
    return error.item(), sum(cell in keep_1K[0].tolist() for cell in cells)


def test_twice_gives_the_same_bytes(project):
    written = []
    for _ in range(2):
        pretrain.main(config.load("pretrain"))
        written.append({path.name: path.read_bytes() for path in SELECTOR.iterdir()})
    assert written[0] == written[1]


@pytest.mark.parametrize("reducer", ["class_attention", "pixel_variance"])
def test_a_reducer_of_signals_that_ragged_features_lack_is_left_out_by_name(project, reducer):
    results = measure(reducer)
    assert results["lines"] is None
    assert results["left_out"].startswith("needs ")
    assert results["left_out"].endswith(", which an encoder of one grid gives")


@pytest.mark.exhaustive
@pytest.mark.timeout(600)
def test_two_processes_share_the_batches_of_an_epoch(project):
    params = OmegaConf.load("params.yaml")
    params.trainer.update({"devices": 2, "strategy": "ddp"})
    params.pretrain.batch_size = 2
    OmegaConf.save(params, "params.yaml")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-m", "atr.stages.reconstructor"], check=True, env=environment)
    assert FeatureAutoencoder.from_pretrained(RANDOM_MASKS).selector.grid == (3, 3)
    others = RANDOM_MASKS.parent.glob("selector-*")
    assert [FeatureSelector.from_pretrained(folder).layer for folder in others] == ["merged"]
