"""The stages of the second micro model on a tiny tower: probed, encoded, trained, loaded."""

import re
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

from atr.config.presets import ENCODERS as PRESETS
from atr.core.files import read_json, write_json
from atr.features.encoder import Encoder
from atr.features.store import FeatureStore
from atr.features.wheel_weights import resolve_weights
from atr.micro.drawing import SIZE
from atr.micro.lessons import draw_lesson
from atr.micro.model import build_model, build_processor
from atr.micro.params import PARAMETERS, load_micro
from atr.micro.scoring import score_benchmark
from atr.micro.stages import features, probe, train_dinov2
from atr.micro.vocabulary import VOCABULARY
from atr.micro.world import DRAW
from atr.stages import ENCODER_FOLDER
from atr.vlm.checkpoint import load_vlm
from atr.vlm.compatibility import check_features

ROOT = Path(__file__).parents[3]
SECTIONS = {
    "micro_probe": {"images": 24, "sizes": "[28, 42]"},
    "micro_features": {"images": 5, "batch_size": 2, "charts": 0.9},
    "micro_dinov2": {
        "new_layers": 1, "steps": 4, "batch_size": 2, "warmup_steps": 1,
        "epochs": 2, "workers": 0, "compile": "false", "reading": 0.5, "questions": 1,
    },
}  # fmt: skip


@pytest.fixture
def logged(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_dinov2, "VALIDATION_QUESTIONS", 1)
    text = (ROOT / PARAMETERS.path).read_text()
    for section, values in SECTIONS.items():
        above, _, below = text.partition(f"\n{section}:")
        for key, value in values.items():
            below, count = re.subn(rf"^( +{key}: ).*$", rf"\g<1>{value}", below, count=1, flags=re.MULTILINE)
            assert count == 1, key
        text = f"{above}\n{section}:{below}"
    text = text.replace("accelerator: auto", "accelerator: cpu").replace("precision: auto", "precision: 32")
    Path(PARAMETERS.path).parent.mkdir(parents=True)
    Path(PARAMETERS.path).write_text(text)
    tower = {"hidden_size": 24, "num_hidden_layers": 7, "num_attention_heads": 3, "mlp_ratio": 1}
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(**tower, patch_size=14, image_size=518)).save_pretrained(
        "data/encoders/dinov2-small"
    )
    BitImageProcessorPil(size={"shortest_edge": 256}).save_pretrained("data/encoders/dinov2-small")
    processor = build_processor(VOCABULARY, SIZE)
    build_model(processor, SIZE, width=64, layers=1, text_layers=1).save_pretrained("data/micro/llava")
    processor.save_pretrained("data/micro/llava")
    metrics = {}

    def log(values, step=None):
        metrics.update(values)

    run = SimpleNamespace(metrics=log, artifact=lambda *_, **__: None, logger=DummyLogger)
    monkeypatch.setattr("atr.core.tracking.run", lambda *_, **__: nullcontext(run))
    return metrics


def test_the_probe_covers_every_size_and_layer(logged):
    probe.main(load_micro("micro_probe"))
    found = read_json(probe.PROBE)
    assert (found["encoder"], found["images"]) == ("dinov2-small", 24)
    assert set(found["accuracy"]) == {"28", "42"}
    for layers in found["accuracy"].values():
        assert set(layers) == {str(layer) for layer in range(1, 8)}
        assert all(0 <= right <= 1 for right in layers.values())


@pytest.mark.slow
def test_the_saved_model_loads_with_its_tower_and_scores_as_its_card_says(logged):
    features.main(load_micro("micro_features"))
    store = FeatureStore.open(features.FEATURES)
    preset = PRESETS["dinov2-small"]
    encoder = Encoder.load("data/encoders/dinov2-small", preset.layer, size=preset.size)
    for index in (0, 1, 2, 4):
        image = draw_lesson(index, 0, reading=index < 2, transcribe=0.0, charts=0.9).image
        with torch.inference_mode():
            expected = encoder(encoder.preprocess([image]))[0].bfloat16()
        torch.testing.assert_close(store[index], expected, rtol=2**-7, atol=1e-4)

    write_json(probe.PROBE, {"encoder": "dinov2-small", "images": 8, "accuracy": {"224": {"1": 0.75}}})
    train_dinov2.main(load_micro("micro_dinov2"))
    model, processor = load_vlm(
        str(train_dinov2.MODEL),
        torch.float32,
        resolve_weights=partial(resolve_weights, folder=ENCODER_FOLDER),
    )
    check_features(model, store.manifest)
    card = (train_dinov2.MODEL / "README.md").read_text()
    for benchmark in DRAW:
        score = score_benchmark(processor, model, benchmark, "evaluate", 1, 0)
        assert logged[benchmark] == score and f"| {benchmark} | {score:.3f} |" in card
    assert "| size | 1 |\n| --- | --- |\n| 224 | 0.75 |" in card
    assert sum(file.stat().st_size for file in train_dinov2.MODEL.iterdir()) < 2**20


def test_features_of_other_lessons_are_refused(logged):
    features.main(load_micro("micro_features"))
    write_json(probe.PROBE, {"encoder": "dinov2-small", "images": 8, "accuracy": {"224": {"1": 0.75}}})
    text = Path(PARAMETERS.path).read_text()
    Path(PARAMETERS.path).write_text(text.replace("seed: 0", "seed: 1", 1))
    with pytest.raises(ValueError, match="seed is 0, expected 1: run the extract stage again"):
        train_dinov2.main(load_micro("micro_dinov2"))
