"""The pretrain stage in a folder of its own: what it writes, twice the same, and what a signal leaves."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file

from atr import config
from atr.features.store import ShardWriter, clear_store, write_manifest
from atr.reduction import FeatureSelector
from atr.reduction.autoencoder import FeatureAutoencoder
from atr.stages import AUTOENCODER, PRETRAIN_FEATURES, SELECTOR, pretrain

ROOT = Path(__file__).parents[2]
METRICS = Path("experiments/pretrain/metrics.json")
IMAGES = 40


class Log:
    """Stands in for tracking.run; `artifact` may be told to fail at the picture of an epoch."""

    def __init__(self):
        self.pictures, self.values, self.stop_at = [], {}, None

    def __call__(self, stage, params):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return False

    def metrics(self, values):
        self.values = values

    def logger(self):
        return DummyLogger()

    def artifact(self, path, folder):
        if folder == "masks":
            assert Image.open(path).size[0] > 0
            self.pictures.append(path.name)
            if path.name == self.stop_at:
                raise KeyboardInterrupt


class Prepared:
    """Stands in for the prepared images: one colour each."""

    parameters: ClassVar = {"prepare": {"source": "a_folder/of|pages"}}

    def __init__(self, folder, verify):
        pass

    def __getitem__(self, index):
        return f"docs/{index}", Image.new("RGB", (28, 42), (6 * index, 0, 0))


@pytest.fixture
def log(tmp_path, monkeypatch):
    """An empty project with a store of features and images to go with it."""
    monkeypatch.chdir(tmp_path)
    write_params()
    write_store()
    log = Log()
    monkeypatch.setattr("atr.datasets.PreparedImages", Prepared)
    monkeypatch.setattr("atr.core.tracking.run", log)
    return log


def write_params(**changes):
    params = OmegaConf.load(ROOT / "params.yaml")
    small = {"layers": 1, "heads": 2, "epochs": 3, "batch_size": 4, "validation": 0.2, "collapse_after": 1.0}
    params.pretrain.update({**small, "keep": 0.4, "mask_images": 2, **changes})
    params.trainer.update({"accelerator": "cpu", "devices": 1, "precision": "32-true"})
    OmegaConf.save(params, "params.yaml")


def write_store(seed=0):
    clear_store(PRETRAIN_FEATURES)
    writer = ShardWriter(PRETRAIN_FEATURES, IMAGES, 16)
    features = torch.randn(IMAGES, 6, 8, generator=torch.Generator().manual_seed(seed))
    for first in range(0, IMAGES, 8):
        ids = [f"docs/{number}" for number in range(first, first + 8)]
        writer.add(first, ids, features[first : first + 8])
    write_manifest(
        PRETRAIN_FEATURES,
        encoder="micro",
        layer=-2,
        grid=(3, 2),
        width=8,
        fingerprint="0f" * 32,
        parameters={"encoder": "micro"},
        shards=writer.shards,
    )


def run():
    pretrain.main(config.load("pretrain"))
    return METRICS.read_bytes()


def checkpoints():
    return list(pretrain.PRETRAIN_CHECKPOINTS.glob("*"))


def test_writes_selector_autoencoder_metrics_and_a_picture_each_epoch(log):
    metrics = json.loads(run())
    selector = FeatureSelector.from_pretrained(SELECTOR)
    assert (selector.encoder, selector.layer, selector.keep, selector.grid) == ("micro", -2, 0.4, (3, 2))
    whole = FeatureAutoencoder.from_pretrained(AUTOENCODER)
    features = torch.randn(2, 6, 8)
    assert torch.equal(whole.selector(features), selector(features))
    assert log.pictures == ["epoch-000.png", "epoch-001.png", "epoch-002.png"]
    assert [epoch["epoch"] for epoch in metrics["history"]] == [0, 1, 2]
    assert metrics["final"] == metrics["history"][-1] == log.values
    assert metrics["final"]["step"] == 3 * (IMAGES - 8) // 4
    assert metrics["parameters"] == config.load("pretrain").raw()


def test_the_selector_records_what_it_was_trained_on(log):
    final = json.loads(run())["final"]
    record = FeatureSelector.from_pretrained(SELECTOR).record
    assert {key: record[key] for key in ("data", "images", "fingerprint", "seed", "positions")} == {
        "data": "a_folder/of|pages",
        "images": IMAGES,
        "fingerprint": "0f" * 32,
        "seed": 0,
        "positions": "original",
    }
    assert {f"validation/{name}": score for name, score in record["scores"].items()}.items() <= final.items()
    assert "kept" in record["scores"] and "loss_reconstruction_top_0.5" in record["scores"]
    page = (SELECTOR / "README.md").read_text()
    assert "| training data | a&#95;folder/of&#124;pages |" in page
    assert f"| kept | {final['validation/kept']:.4g} |" in page


def test_training_moves_the_weights_and_starts_from_the_seed(log):
    run()
    trained = load_file(SELECTOR / "model.safetensors")
    assert trained["trunk.head.weight"].abs().max() > 0
    write_params(epochs=1)
    run()
    other = load_file(SELECTOR / "model.safetensors")
    assert torch.equal(other["standardise.mean_D"], trained["standardise.mean_D"])
    assert not torch.equal(other["trunk.head.weight"], trained["trunk.head.weight"])


def test_twice_gives_the_same_bytes(log):
    def outputs():
        return run(), {path.name: path.read_bytes() for path in SELECTOR.iterdir()}

    first = outputs()
    assert outputs() == first
    assert set(first[1]) == {"config.json", "model.safetensors", "README.md"}


def interrupt(log, picture="epoch-001.png", others=()):
    log.stop_at = picture
    with pytest.raises(SystemExit):  # what Lightning makes of Ctrl-C
        run()
    log.stop_at, log.pictures = None, []
    assert not METRICS.exists() and not SELECTOR.exists()
    assert {*others} < {*checkpoints()} and len(checkpoints()) == len(others) + 1


def test_interrupted_run_is_resumed_and_ends_as_the_unbroken_one(log):
    unbroken, weights = run(), (SELECTOR / "model.safetensors").read_bytes()
    shutil.rmtree(METRICS.parent)
    interrupt(log)
    assert run() == unbroken
    assert (SELECTOR / "model.safetensors").read_bytes() == weights
    assert log.pictures == ["epoch-001.png", "epoch-002.png"]  # the first epoch was not made again


CHANGES = {
    "params": lambda patch: write_params(learning_rate=1e-3),
    "store": lambda patch: write_store(seed=1),
    "code": lambda patch: patch.setattr("atr.stages.folder_digest", lambda *_: "other"),
    "libraries": lambda patch: patch.setattr("atr.stages.version", lambda library: f"{library} 99"),
    "precision": lambda patch: patch.setattr("atr.core.hardware.precision_of", lambda trainer: "bf16-mixed"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_checkpoint_of_another_training_is_not_resumed(log, change, monkeypatch):
    """It is left alone as long as this training may be broken off too, and removed at its end."""
    interrupt(log)
    (former,) = checkpoints()
    CHANGES[change](monkeypatch)
    interrupt(log, others=[former])
    run()
    assert former not in checkpoints() != []


def remove_outputs():
    """As DVC does before it runs the stage again."""
    for folder in (SELECTOR, AUTOENCODER):
        shutil.rmtree(folder, ignore_errors=True)
    METRICS.unlink(missing_ok=True)


@pytest.mark.parametrize("stopped_at", ["atr.stages.pretrain.write_json", "nothing, DVC was stopped"])
def test_a_finished_training_is_not_made_again(log, monkeypatch, stopped_at):
    unbroken, weights = run(), (SELECTOR / "model.safetensors").read_bytes()
    shutil.rmtree(METRICS.parent)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        if stopped_at.startswith("atr"):
            patch.setattr(stopped_at, full)
        with pytest.raises(OSError, match="No space") if stopped_at.startswith("atr") else nullcontext():
            run()
    remove_outputs()
    log.pictures = []
    assert run() == unbroken and (SELECTOR / "model.safetensors").read_bytes() == weights
    assert log.pictures == []


def test_store_of_another_encoder_is_refused(log):
    manifest = PRETRAIN_FEATURES / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"encoder": "micro"', '"encoder": "other"'))
    with pytest.raises(ValueError, match="encoder is 'other', expected 'micro'"):
        run()


TWO = """
import atr.datasets, atr.features.store, atr.core.files, atr.core.tracking, os, runpy
from pathlib import Path
toy = runpy.run_path({path!r})
hashed = Path("hashed-by-" + os.environ.get("LOCAL_RANK", "0"))

def sha256(path):
    with hashed.open("a") as log:
        print(path.name, file=log)
    return atr.core.files.sha256(path)

atr.features.store.sha256 = sha256
atr.core.tracking.run = toy["Log"]()
atr.datasets.PreparedImages = toy["Prepared"]
toy["run"]()
"""


@pytest.mark.slow
def test_of_two_ranks_the_first_hashes_the_store(log):
    write_params(epochs=1)
    params = OmegaConf.load("params.yaml")
    params.trainer.update({"devices": 2, "strategy": "ddp"})
    OmegaConf.save(params, "params.yaml")
    Path("two.py").write_text(TWO.format(path=__file__))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([sys.executable, "two.py"], env=environment, start_new_session=True) as process:
        try:
            assert process.wait() == 0
        finally:  # should one hang, pytest's timeout must not leave the other rank behind
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert [path.name for path in Path().glob("hashed-by-*")] == ["hashed-by-0"]
    assert sorted(Path("hashed-by-0").read_text().split()) == [f"shard-0000{n}.safetensors" for n in range(3)]
    assert SELECTOR.is_dir()


SCRIPT = """
import atr.datasets, atr.core.tracking, os, signal, sys
sys.path.insert(0, sys.argv[1])
from importlib.util import module_from_spec, spec_from_file_location
spec = spec_from_file_location("toy", sys.argv[1] + "/tests/stages/test_pretrain.py")
toy = module_from_spec(spec)
spec.loader.exec_module(toy)
from atr.stages import entry, pretrain

class Signalled(toy.Log):
    def artifact(self, path, folder):
        if path.name == "epoch-001.png":
            os.kill(os.getpid(), int(sys.argv[2]))

atr.core.tracking.run = Signalled()
atr.datasets.PreparedImages = toy.Prepared
sys.argv = ["pretrain"]
entry("pretrain", pretrain.main)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_ends_the_process_with_its_code_and_no_output(log, warm_stages, number, code):
    script = SCRIPT.replace("int(sys.argv[2])", str(int(number))).replace("sys.argv[1]", repr(str(ROOT)))
    done = warm_stages.run("-c", script, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == code, done.stderr[-2000:]
    assert not METRICS.exists() and not SELECTOR.exists()
    assert len(checkpoints()) == 1


def test_the_metrics_record_precision_and_device(log):
    resolved = json.loads(run())["resolved"]
    assert (resolved["precision"], resolved["device"], resolved["features"]) == ("32-true", "cpu", {})


KILLED = """
import os, runpy, signal, sys
from importlib import import_module
toy = runpy.run_path({path!r})
import atr.datasets, atr.core.tracking
atr.datasets.PreparedImages = toy["Prepared"]
class Log(toy["Log"]):
    def artifact(self, path, folder):
        if folder == {owner!r}:
            os.kill(os.getpid(), signal.SIGKILL)
atr.core.tracking.run = Log()
if {name!r}:
    owner, real = import_module({owner!r}), getattr(import_module({owner!r}), {name!r})
    calls = []
    def killing(*given, **named):
        calls.append(given)
        if len(calls) == {call}:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*given, **named)
    setattr(owner, {name!r}, killing)
toy["run"]()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "owner", "name", "call", "made"),
    [
        ("the second checkpoint is being written", "atr.reduction.checkpoints", "_before", 2, [1, 2]),
        ("the first one is out of the way, the second not there yet", "os", "fsync", 2, [1, 2]),
        ("the selector is written, the autoencoder is not", "atr.stages.pretrain", "whole_folder", 2, []),
        ("the results are written, and not yet logged", "selector", "", 0, []),
    ],
)
def test_a_kill_costs_no_more_than_an_epoch(log, moment, owner, name, call, made):
    unbroken, weights = run(), (SELECTOR / "model.safetensors").read_bytes()
    shutil.rmtree(METRICS.parent)
    script = KILLED.format(path=__file__, owner=owner, name=name, call=call)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", script], env=environment).returncode == -signal.SIGKILL
    remove_outputs()
    log.pictures = []
    assert run() == unbroken and (SELECTOR / "model.safetensors").read_bytes() == weights
    assert log.pictures == [f"epoch-00{epoch}.png" for epoch in made]
    assert not list(METRICS.parent.rglob("*.part"))
