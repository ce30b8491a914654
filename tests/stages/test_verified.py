"""What the processes of a stage read together is verified by the first of them, and by no other."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from atr import config
from atr.micro.params import load_micro
from atr.micro.stages import features, train_dinov2
from atr.stages import (
    EVALUATE_FEATURES,
    EVALUATE_IMAGES,
    PRETRAIN_FEATURES,
    PRETRAIN_IMAGES,
    distill,
    evaluate,
    extract,
    pretrain,
    reconstructor,
)

ROOT = Path(__file__).parents[2]


class Stopped(Exception):
    """All is opened that the stage opens."""


def stop(*_, **__):
    raise Stopped


def nothing(*_, **__):
    return SimpleNamespace(preprocess=None, image_processor=None)


def opening(model, precision, device, images, features, *_):
    """In place of the language model: takes what it was given, as a model on stored features does."""
    images()
    features()
    raise Stopped


@pytest.fixture(params=[True, False], ids=["first", "later"])
def first(request):
    """Whether the process is the first one."""
    return request.param


@pytest.fixture
def opened(first, monkeypatch):
    """Whether each folder that is opened was to be verified; nothing is read."""
    asked = {}

    class Prepared:
        ids, parameters = (), {}

        def __init__(self, folder, verify=True):
            asked[folder] = verify

        def __len__(self):
            return 0

    def open_store(folder, expect, verify=True):
        asked[folder] = verify

    monkeypatch.setattr("atr.datasets.PreparedImages", Prepared)
    monkeypatch.setattr("atr.features.store.FeatureStore.open", open_store)
    monkeypatch.setattr("atr.core.tracking.run", lambda *_, **__: nullcontext())
    monkeypatch.setattr("atr.core.tracking.is_first_process", lambda: first)
    return asked


def loaded(stage):
    if stage is train_dinov2:
        return load_micro("micro_dinov2", ROOT / "data/micro/params.yaml")
    return config.load(stage.__name__.rpartition(".")[2], ROOT / "params.yaml")


@pytest.mark.parametrize(
    "stage, arguments, others, folders",
    [
        (
            extract,
            ("pretrain",),
            {
                "atr.features.wheel_weights.resolve_weights": nothing,
                "atr.features.encoder.Encoder.load": nothing,
                "atr.features.datamodule.ImageDataModule": stop,
            },
            {PRETRAIN_IMAGES},
        ),
        (
            pretrain,
            (),
            {"atr.features.datamodule.FeatureDataModule": stop},
            {PRETRAIN_FEATURES, PRETRAIN_IMAGES},
        ),
        (
            distill,
            (),
            {"atr.datasets.load_prompts": stop},
            {PRETRAIN_FEATURES, PRETRAIN_IMAGES},
        ),
        (
            evaluate,
            ("random",),
            {"atr.datasets.load_questions": nothing, "atr.vlm.generation.Generator.load": opening},
            {EVALUATE_FEATURES, EVALUATE_IMAGES},
        ),
        (
            reconstructor,
            (),
            {"atr.stages.reconstructor._train": stop},
            {PRETRAIN_FEATURES},
        ),
        (
            train_dinov2,
            (),
            {"atr.micro.stages.train_dinov2.read_json": nothing, "lightning.pytorch.seed_everything": stop},
            {features.FEATURES},
        ),
    ],
)
def test_the_first_process_alone_verifies(stage, arguments, others, folders, first, opened, monkeypatch):
    fabric = SimpleNamespace(launch=nothing, is_global_zero=first, device="cpu")
    monkeypatch.setattr("lightning.fabric.Fabric", lambda **_: fabric)
    for name, other in others.items():
        monkeypatch.setattr(name, other)
    with pytest.raises(Stopped):
        stage.main(loaded(stage), *arguments)
    assert opened == dict.fromkeys(folders, first)
