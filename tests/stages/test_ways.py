"""Every stage that computes, in every precision and strategy that trainer may name, on a tiny model."""

import os
import re
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger

from atr import config
from atr.config.trainer import Precision, Strategy
from atr.core.files import read_json
from atr.micro.model import build_model, build_processor
from atr.micro.vocabulary import VOCABULARY
from atr.stages import (
    DISTILL,
    DISTILLED,
    EVALUATE,
    EVALUATE_FEATURES,
    INTRINSIC,
    LATENCY,
    PREFILL,
    PRETRAIN,
    PRETRAIN_FEATURES,
    PRETRAIN_IMAGES,
    RECONSTRUCTOR,
    ROBUSTNESS,
    SELECTOR,
    distill,
    evaluate,
    extract,
    intrinsic,
    latency,
    prefill,
    prepare,
    pretrain,
    reconstructor,
    robustness,
)

ROOT = Path(__file__).parents[2]
CHANGES = {
    "accelerator": "cpu",
    "images": 12,
    "questions": 1,
    "epochs": 1,
    "batch_size": 2,
    "layers": 1,
    "heads": 1,
    "mask_images": 1,
    "collapse_after": 1.0,
    "random_seeds": 1,
    "pretrain_images": 4,
    "training_seeds": 1,
    "seconds": 0.001,
    "bootstrap": 2,
    "max_new_tokens": 2,
    "batches": "[1]",
}
STAGES = {
    "extract": lambda: [extract.main(config.load("extract"), split) for split in extract.SPLITS],
    "pretrain": lambda: pretrain.main(config.load("pretrain")),
    "distill": lambda: distill.main(config.load("distill")),
    "evaluate": lambda: evaluate.main(config.load("evaluate"), "selector"),
    "reconstructor": lambda: reconstructor.main(config.load("reconstructor")),
    "intrinsic": lambda: intrinsic.main(config.load("intrinsic"), "selector"),
    "prefill": lambda: prefill.main(config.load("prefill")),
    "latency": lambda: latency.main(config.load("latency"), "selector"),
    "robustness": lambda: robustness.main(config.load("robustness"), "selector"),
}
RESULTS = (
    EVALUATE_FEATURES / "manifest.json",
    PRETRAIN_FEATURES / "manifest.json",
    PRETRAIN / "metrics.json",
    DISTILL / "metrics.json",
    EVALUATE / "selector" / "summary.json",
    RECONSTRUCTOR / "metrics.json",
    INTRINSIC / "selector" / "metrics.json",
    PREFILL / "metrics.json",
    LATENCY / "selector" / "metrics.json",
    ROBUSTNESS / "selector" / "metrics.json",
)


def unlogged(*_, **__):
    log = SimpleNamespace(metrics=lambda *_: None, artifact=lambda *_, **__: None, logger=DummyLogger)
    return nullcontext(log)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A tiny model in the place of the shipped one, and a few images and questions of the micro world."""
    folder = tmp_path_factory.mktemp("prepared")
    torch.manual_seed(0)
    processor = build_processor(VOCABULARY, 56)
    model = folder / "data/micro/llava"
    build_model(processor, 56, width=64, layers=2, text_layers=1).save_pretrained(model)
    processor.save_pretrained(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_params()
        patch.setattr("atr.core.tracking.run", unlogged)
        prepare.main(config.load("prepare"))
    return folder


def write_params(**trainer):
    text = (ROOT / "params.yaml").read_text()
    for key, value in (CHANGES | trainer).items():
        text, count = re.subn(rf"^( +{key}: ).*$", rf"\g<1>{value}", text, flags=re.MULTILINE)
        assert count, key
    text = re.sub(r"^  keep: \[.*\]$", "  keep: [0.5]", text, flags=re.MULTILINE)
    Path("params.yaml").write_text(text)


@pytest.fixture
def project(prepared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("atr.core.tracking.run", unlogged)
    Path("data").mkdir()
    for part in ("data/micro", "data/prepared"):
        Path(part).symlink_to(prepared / part)
    yield tmp_path
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def check_results(results=RESULTS):
    for file in results:
        assert read_json(file)
    for folder in (SELECTOR, DISTILLED):
        assert (folder / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("precision", [name for name in get_args(Precision) if "16-mixed" != name != 16])
def test_every_stage_runs_in_every_precision(project, precision):
    write_params(precision=precision)
    for run in STAGES.values():
        run()
    check_results()


@pytest.mark.parametrize("stage", sorted(STAGES.keys() - {"intrinsic", "robustness"}))  # always in float32
def test_a_precision_that_the_machine_lacks_is_refused_before_the_work(project, stage, monkeypatch):
    monkeypatch.setattr("atr.features.store.FeatureStore.open", lambda *_, **__: None)
    monkeypatch.setattr("atr.reduction.autoencoder.FeatureAutoencoder.from_pretrained", lambda *_: None)
    write_params(precision="16-mixed")
    with pytest.raises(ValueError, match=r"^trainer\.precision: 16-mixed needs a GPU"):
        STAGES[stage]()
    assert not any(file.exists() for file in RESULTS)


@pytest.mark.slow
@pytest.mark.timeout(900)  # as many times the imports, on a machine that may be busy
@pytest.mark.parametrize("strategy", [name for name in get_args(Strategy) if name != "auto"])
def test_every_stage_runs_in_two_processes_under_every_strategy(project, warm_stages, strategy):
    """Auto runs above. Of the later stages `reconstructor` alone uses several processes: see its own test."""
    write_params(devices=2, strategy=strategy, precision="32-true", batch_size=1)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for stage in (
        "extract pretrain", "extract evaluate", "pretrain", "distill", "evaluate selector",
    ):  # fmt: skip
        name, *arguments = stage.split()
        warm_stages.run("-m", f"atr.stages.{name}", *arguments, env=environment).check_returncode()
    check_results(RESULTS[:5])


@pytest.mark.parametrize(
    "file",
    ["model.safetensors", "tokenizer.json", "chat_template.jinja", "generation_config.json", "manifest.json"],
)
def test_a_teacher_or_images_that_are_saved_anew_teach_from_the_start(project, prepared, monkeypatch, file):
    """All of them change what a selector is taught: its checkpoint is another one's then."""
    for part in ("data/micro", "data/prepared"):
        Path(part).unlink()
        shutil.copytree(prepared / part, part)
    write_params()
    extract.main(config.load("extract"), "pretrain")
    known = []

    def train(module, data, checkpoints, *_, **__):
        known.append(checkpoints._depends_on)

    monkeypatch.setattr("atr.vlm.distillation.train_selector", train)
    distill.main(config.load("distill"))
    where = PRETRAIN_IMAGES if file == "manifest.json" else Path("data/micro/llava")
    content = (where / file).read_bytes()
    # The last byte of the last weight, or one more blank at the end.
    changed = content[:-1] + b"\x01" if file.endswith("safetensors") else content + b"\n"
    (where / file).write_bytes(changed)
    distill.main(config.load("distill"))
    assert known[0] != known[1]
    (where / file).write_bytes(content)
    distill.main(config.load("distill"))
    assert known[0] == known[2]
