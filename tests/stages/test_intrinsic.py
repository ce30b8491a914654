"""The reconstructor and intrinsic stages in a folder of their own, on a tiny tower and drawn images."""

import json
import os
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from omegaconf import OmegaConf

from atr import config
from atr.core.tokens import mask_of
from atr.datasets.annotations import TEXT_ANNOTATION
from atr.datasets.drawn import MICRO, draw_rows
from atr.datasets.prepared import save_images
from atr.features.store import FeatureStore, ShardWriter, write_manifest
from atr.micro import world
from atr.micro.model import build_model, build_processor
from atr.reduction.autoencoder import FeatureAutoencoder
from atr.reduction.losses import unexplained_variance
from atr.stages import (
    AUTOENCODER,
    DISTILLED,
    EVALUATE_FEATURES,
    EVALUATE_IMAGES,
    INTRINSIC,
    PRETRAIN_FEATURES,
    RECONSTRUCTOR,
    SELECTOR,
    intrinsic,
    reconstructor,
)

ROOT = Path(__file__).parents[2]
SIZE, WIDTH, GRID, TOKENS = 56, 64, (4, 4), 16
KEEP = [0.25, 0.5]
SEED = 3  # of the prepared images; the stage's own is another
PREPARED = {"seed": SEED, "prepare": {"source": "micro", "prompts": [], "split": "evaluate"}}
IMAGES = [f"{benchmark}/{number:06d}" for benchmark in ("docs", "shapes") for number in range(6)]
COMPUTED = {"precision": "bf16-mixed", "device": "cuda"}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """What the stages before leave: tower, features, images, selector and autoencoder."""
    folder = tmp_path_factory.mktemp("project")
    torch.manual_seed(0)
    processor = build_processor(["total"], SIZE)
    model = folder / "data/micro/llava"
    build_model(processor, SIZE, WIDTH, layers=1).save_pretrained(model)
    processor.save_pretrained(model)
    save_store(folder / EVALUATE_FEATURES, IMAGES)
    save_store(folder / PRETRAIN_FEATURES, [f"docs/{number}" for number in range(20)])
    rows = (next(islice(draw_rows(MICRO, *split(name)[:2], SEED), split(name)[2], None)) for name in IMAGES)
    images = (
        (name, row["image"].image, row["image"].text_centres) for name, row in zip(IMAGES, rows, strict=True)
    )
    save_images(folder / EVALUATE_IMAGES, images, PREPARED, TEXT_ANNOTATION)
    autoencoder = FeatureAutoencoder(WIDTH, GRID, layers=1, heads=1)
    for trunk in (autoencoder.selector.trunk, autoencoder.reconstructor.trunk):
        torch.nn.init.normal_(trunk.head.weight, std=0.1)
    for selector in (SELECTOR, DISTILLED):
        autoencoder.selector.save_pretrained(folder / selector)
    autoencoder.save_pretrained(folder / AUTOENCODER)
    return folder


def split(name):
    benchmark, index = name.split("/")
    return benchmark, "evaluate", int(index)


def save_store(folder, names):
    folder.mkdir(parents=True)
    writer = ShardWriter(folder, len(names), len(names))
    writer.add(0, names, torch.randn(len(names), TOKENS, WIDTH))
    about = {"encoder": "micro", "layer": -1, "grid": GRID, "width": WIDTH}
    write_manifest(folder, **about, parameters={"encoder": "micro"}, shards=writer.shards, resolved=COMPUTED)


@pytest.fixture
def project(prepared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for part in ("data", "experiments/pretrain", "experiments/distill"):
        Path(part).parent.mkdir(exist_ok=True)
        Path(part).symlink_to(prepared / part)
    write_params()
    logged = {}
    log = SimpleNamespace(
        metrics=lambda values, step: logged.update({step: logged.get(step, {}) | values}),
        artifact=lambda *_: None,
        logger=DummyLogger,
    )
    monkeypatch.setattr("atr.core.tracking.run", lambda *_, **__: nullcontext(log))
    return logged


def write_params(trainer=None, **changes):
    params = OmegaConf.load(ROOT / "params.yaml")
    params.trainer.update({"accelerator": "cpu", "devices": 1, "precision": "32-true"} | (trainer or {}))
    params.pretrain.update({"layers": 1, "heads": 1, "epochs": 1, "batch_size": 4, "validation": 0.1})
    params.pretrain.collapse_after = 1.0
    params.evaluate.update({"keep": KEEP, "random_seeds": 2, "reducers": ["full", "none", "random"]})
    params.evaluate.update({key: value for key, value in changes.items() if key in params.evaluate})
    params.intrinsic.update({"images": 6, "batch_size": 4, "epochs": 1, "overlap_keep": 0.5})
    params.intrinsic.update({key: value for key, value in changes.items() if key in params.intrinsic})
    OmegaConf.save(params, "params.yaml")


def train():
    reconstructor.main(config.load("reconstructor"))


def run(reducer):
    intrinsic.main(config.load("intrinsic"), reducer)
    return json.loads((INTRINSIC / reducer / "metrics.json").read_text())


def test_a_reducer_is_measured_at_every_kept_fraction(project):
    train()
    for reducer, seeds in (("random", 2), ("selector", 1)):
        results = run(reducer)
        assert set(results) == {
            "reducer", "keep", "lines", "masks", "stability", "left_out",
            "parameters", "provenance", "resolved",
        }  # fmt: skip
        assert (results["reducer"], results["keep"], results["left_out"]) == (reducer, KEEP, "")
        assert results["resolved"]["features"] == COMPUTED and results["resolved"]["device"] == "cpu"
        lines, masks = results["lines"], results["masks"]
        assert set(lines) == {"reconstruction", "reconstruction_random", "text_coverage"}
        assert all(len(line) == len(KEEP) for line in lines.values())
        assert all(0 < value < 1 for value in lines["text_coverage"])
        assert (masks["keep"], masks["images"]) == (0.5, IMAGES[::2])
        assert [len(kept) for kept in masks["kept"]] == [6] * seeds
        assert {len(indices) for kept in masks["kept"] for indices in kept} == {8}
        assert results["stability"] is None
        assert results["parameters"] == config.load("intrinsic").raw()
        assert results["provenance"]["versions"]
        assert project[50][f"{reducer}/text_coverage"] == lines["text_coverage"][1]


def test_the_selector_is_measured_on_images_at_even_steps_by_its_own_reconstructor(project):
    train()
    lines = run("selector")["lines"]
    net = FeatureAutoencoder.from_pretrained(AUTOENCODER)
    store, chosen = FeatureStore.open(EVALUATE_FEATURES), IMAGES[::2]
    features = torch.stack([store[store.index(name)] for name in chosen]).float()
    with torch.no_grad():
        for place, count in enumerate((4, 8)):
            keep_BK = net.selector.select(features, count)
            restored = net.restore(features, mask_of(keep_BK, TOKENS))
            error = unexplained_variance(restored, features, net.selector.standardise.variance)
            assert lines["reconstruction"][place] == pytest.approx(error.item(), rel=1e-5)
            covered = total = 0
            for name, kept in zip(chosen, keep_BK.tolist(), strict=True):
                for character in world.sample(*split(name), SEED).characters:
                    side = world.SIZE / GRID[0]
                    covered += int(character.y // side) * GRID[1] + int(character.x // side) in kept
                    total += 1
            assert lines["text_coverage"][place] == pytest.approx(covered / total)


def test_twice_gives_the_same_bytes_and_other_training_another_reconstructor(project):
    train()
    first = run("selector")["lines"]
    content = (INTRINSIC / "selector" / "metrics.json").read_bytes()
    train()
    run("selector")
    assert (INTRINSIC / "selector" / "metrics.json").read_bytes() == content
    for change in ({"epochs": 2}, {"pretrain_images": 8}):
        write_params(**change)
        train()
        other = run("selector")["lines"]
        assert other["reconstruction"] == first["reconstruction"]
        assert other["reconstruction_random"] != first["reconstruction_random"]


def test_more_training_seeds_give_the_stability_of_the_selector(project):
    write_params(training_seeds=3)
    train()
    stability = run("selector")["stability"]
    assert (stability["keep"], stability["seeds"]) == (KEEP, 3)
    assert all(0 < value < 1 for value in stability["iou"])
    assert project[25]["selector/stability"] == stability["iou"][0]
    assert run("random")["stability"] is None


@dataclass(frozen=True)
class Looking:
    """Keeps the most attended tokens, after it has seen that it was given what it needs."""

    needs: frozenset = field(default=frozenset({"attention_BN", "keys_BND", "pixels_BCHW", "grid"}))

    def __call__(self, encoded, budget):
        assert encoded.features_BND.dtype == torch.bfloat16, "as the evaluation gives them"
        assert len(encoded.keys_BND) == len(encoded.pixels_BCHW) == len(encoded.attention_BN)
        return encoded.attention_BN.topk(budget).indices.sort().values


def test_what_a_reducer_needs_of_the_tower_is_computed(project, monkeypatch):
    train()
    monkeypatch.setattr("atr.reduction.registry.build_reducer", lambda *_: Looking())
    results = run("class_attention")
    assert results["left_out"] == "" and len(results["lines"]["reconstruction"]) == len(KEEP)


@pytest.mark.parametrize(
    "reducer, reason",
    [
        ("full", "takes no budget"),
        ("none", "takes no budget"),
        ("selector_adaptive", "takes no budget"),
        ("distilled", "needs projected_BND, which a language model gives"),
        ("cdpruner_text", "needs projected_BND, text_BD, which a language model gives"),
        ("pyramiddrop", "chooses between the layers of a language model"),
    ],
)
def test_a_reducer_that_cannot_be_measured_says_why(project, reducer, reason):
    results = run(reducer)
    assert (results["left_out"], results["lines"], results["masks"]) == (reason, None, None)
    assert not project


@pytest.mark.parametrize(
    "missing, message",
    [
        ("experiments/pretrain/autoencoder/model.safetensors", "model.safetensors is missing"),
        ("data/features/evaluate/manifest.json", "manifest.json is missing"),
        ("data/prepared/evaluate/manifest.json", "manifest.json is missing"),
    ],
)
def test_what_an_earlier_stage_did_not_leave_is_named(project, missing, message):
    train()
    moved = Path(missing).resolve()
    aside = moved.with_name("aside")
    moved.rename(aside)
    try:
        with pytest.raises(ValueError, match=message):
            run("selector")
    finally:
        aside.rename(moved)
    assert not INTRINSIC.exists()


def test_missing_features_are_named_before_any_training(project, monkeypatch):
    monkeypatch.setattr(reconstructor, "_train", lambda *_: 1 / 0)
    moved = Path("data/features/pretrain/manifest.json").resolve()
    aside = moved.with_name("aside")
    moved.rename(aside)
    try:
        with pytest.raises(ValueError, match=r"manifest\.json is missing"):
            train()
    finally:
        aside.rename(moved)
    assert not RECONSTRUCTOR.exists()


@pytest.mark.slow
@pytest.mark.timeout(900)  # three times the imports, on a machine that may be busy
def test_two_processes_train_and_one_measures(project, warm_stages):
    write_params({"devices": 2, "strategy": "ddp"}, training_seeds=2)
    for command in (("reconstructor",), ("intrinsic", "selector")):
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = warm_stages.run("-m", f"atr.stages.{command[0]}", *command[1:], env=environment)
        assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((INTRINSIC / "selector" / "metrics.json").read_text())
    assert results["stability"]["seeds"] == 2
