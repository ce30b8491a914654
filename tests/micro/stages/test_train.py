"""The stage micro on a tiny model: trained, saved, scored, and loaded again."""

import re
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger

from atr.benchmarks.metrics import exact_match
from atr.micro.params import PARAMETERS, load_micro
from atr.micro.scoring import generate_answers
from atr.micro.stages import train
from atr.micro.world import DRAW, sample
from atr.vlm.checkpoint import load_vlm

ROOT = Path(__file__).parents[3]
RECIPE = {
    "width": 64, "layers": 1, "reading_layer": 0, "naming_layer": 1, "steps": 4, "batch_size": 2,
    "warmup_steps": 1, "epochs": 2, "workers": 0, "compile": "false", "reading": 0.5,
}  # fmt: skip


@pytest.fixture
def logged(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "VALIDATION_QUESTIONS", 2)
    above, _, below = (ROOT / PARAMETERS.path).read_text().partition("\nmicro:")
    section, _, below = below.partition("\n\n")
    for key, value in (RECIPE | {"questions": 3}).items():
        section, count = re.subn(rf"^( +{key}: ).*$", rf"\g<1>{value}", section, flags=re.MULTILINE)
        assert count == 1, key
    above = above.replace("accelerator: auto", "accelerator: cpu")
    Path(PARAMETERS.path).parent.mkdir(parents=True)
    Path(PARAMETERS.path).write_text(f"{above}\nmicro:{section}\n\n{below}")
    metrics = {}
    log = SimpleNamespace(metrics=metrics.update, artifact=lambda *_, **__: None, logger=DummyLogger)
    monkeypatch.setattr("atr.core.tracking.run", lambda *_, **__: nullcontext(log))
    return metrics


def test_the_saved_model_loads_and_scores_as_its_card_says(logged):
    train.main(load_micro("micro"))
    model, processor = load_vlm(str(train.MODEL), torch.float32)
    assert set(logged) == set(DRAW)
    card = (train.MODEL / "README.md").read_text()
    for benchmark, score in logged.items():
        drawn = [sample(benchmark, "evaluate", index, 0) for index in range(3)]
        answers = generate_answers(model, processor, [s.image for s in drawn], [s.turns[0][0] for s in drawn])
        right = [exact_match(a, [s.turns[0][1]]) for a, s in zip(answers, drawn, strict=True)]
        assert score == pytest.approx(sum(right) / 3)
        assert f"| {benchmark} | {score:.3f} |" in card
    weights = (train.MODEL / "model.safetensors").read_bytes()
    shutil.rmtree(train.MODEL)
    with pytest.MonkeyPatch.context() as patch:  # written again from the last checkpoint
        patch.setattr("atr.micro.training.MicroTraining.training_step", lambda *_: 1 / 0)
        train.main(load_micro("micro"))
    assert (train.MODEL / "model.safetensors").read_bytes() == weights
