"""The extract stage in a folder of its own: what it leaves behind, also when it is cut off."""

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers import (
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlavaConfig,
)
from transformers import LlavaForConditionalGeneration as Llava

from atr import config
from atr.config import presets
from atr.datasets.photographs import photograph
from atr.datasets.prepared import save_images
from atr.features.encoder import Encoder
from atr.features.pca import pca_picture
from atr.features.store import FeatureStore
from atr.stages import extract

ROOT = Path(__file__).parents[2]
PRESET = presets.ENCODERS["micro"]
MICRO = Path(PRESET.path)
PREPARED = {"seed": 0, "prepare": {"source": "micro", "prompts": [], "split": "evaluate"}}


def pictures(count=7):
    return [(f"docs/{number}", Image.new("RGB", (56, 56), (30 * number, 9, 200))) for number in range(count)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=3,
        patch_size=14,
        image_size=56,
    )
    text = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=8
    )
    Llava(LlavaConfig(vision_config=vision, text_config=text, image_token_index=1)).save_pretrained(folder)
    CLIPImageProcessorPil(size={"height": 56, "width": 56}, do_center_crop=False).save_pretrained(folder)
    return folder


@pytest.fixture
def workspace(model, tmp_path, monkeypatch):
    """An empty project: a tiny model where the micro one lies, and images in the place of prepared ones."""
    monkeypatch.chdir(tmp_path)
    MICRO.parent.mkdir(parents=True)
    MICRO.symlink_to(model)
    write_params()
    monkeypatch.setattr("atr.datasets.PreparedImages", lambda folder, verify: pictures(), raising=False)
    log = SimpleNamespace(metrics=lambda values: None, artifact=lambda path, folder: None)
    monkeypatch.setattr("atr.core.tracking.run", lambda stage, params, part: nullcontext(log))
    return tmp_path


def write_params(**changed):
    text = (ROOT / "params.yaml").read_text()
    for key, value in (
        {"shard_images": 4, "accelerator": "cpu", "precision": "bf16-mixed"} | changed
    ).items():
        text, count = re.subn(rf"^( *{key}: ).*$", rf"\g<1>{value}", text, flags=re.MULTILINE)
        assert count == 1, key
    Path("params.yaml").write_text(text)


def run(split="pretrain"):
    extract.main(config.load("extract"), split)
    return FeatureStore.open(Path("data/features", split))


@pytest.mark.parametrize("split", ["pretrain", "evaluate"])
def test_the_store_is_the_encoder_under_the_trainers_precision(split, workspace):
    store = run(split)
    encoder = Encoder.load(PRESET.path, PRESET.layer)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        expected = encoder(encoder.preprocess([image for _, image in pictures()[:4]]))
    assert store.ids == [name for name, _ in pictures()]
    assert torch.equal(torch.stack([store[position] for position in range(4)]), expected.bfloat16())
    assert store.manifest["parameters"] == {
        "encoder": "micro",
        "layer": PRESET.layer,
        "precision": "bf16-mixed",
        "batch_size": 32,
        "shard_images": 4,
    }
    assert [path.name for path in Path("data/features").iterdir()] == [split]


def test_the_picture_of_features_shows_the_two_photographs(workspace):
    run()
    picture = Image.open("data/features/pretrain/components.png")
    assert picture.size == (4 * 384, 384)
    features = Encoder.load(PRESET.path, PRESET.layer)
    expected = pca_picture(features, [photograph(name) for name in ("coffee", "flower")])
    assert Path("data/features/pretrain/components.png").read_bytes() == expected


def test_a_second_run_gives_the_same_bytes(workspace):
    contents = []
    for _ in range(2):
        folder = run().folder
        contents.append({file.name: file.read_bytes() for file in folder.iterdir()})
    assert contents[0] == contents[1]
    assert len(contents[0]) == 4


def test_a_layer_in_the_parameters_wins_over_the_encoders_own(workspace):
    write_params(layer=-3)
    assert PRESET.layer != -3
    store = run()
    assert store.manifest["layer"] == store.manifest["parameters"]["layer"] == -3


def test_a_layer_that_is_not_there_stops_the_stage_before_anything_is_written(workspace):
    write_params(layer=7)
    with pytest.raises(ValueError, match=f"{MICRO}: there is no layer 7, allowed: 1 to 3"):
        run()
    assert not Path("data/features").exists()


def tiny_dinov2(folder):
    """A random DINOv2 with the processor that the published one has."""
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=24, num_hidden_layers=7, num_attention_heads=3, mlp_ratio=2, patch_size=14, image_size=518
    )
    Dinov2Model(config).save_pretrained(folder)
    BitImageProcessorPil(size={"shortest_edge": 256}).save_pretrained(folder)
    return folder


def test_the_preset_is_encoded_from_its_folder_at_its_size(workspace):
    folder = tiny_dinov2(Path("data/encoders/dinov2-small"))
    write_params(encoder="dinov2-small", vlm=".", precision="32-true")
    store = run()
    encoder = Encoder.load(str(folder), presets.ENCODERS["dinov2-small"].layer, size=224)
    with torch.inference_mode():
        expected = encoder(encoder.preprocess([image for _, image in pictures()[:4]]))
    assert (store.manifest["encoder"], store.grid, store.width) == ("dinov2-small", (16, 16), 24)
    assert 0 < store.manifest["layer"] == encoder.layer < 7
    assert torch.equal(torch.stack([store[position] for position in range(4)]), expected.bfloat16())


@pytest.mark.slow
def test_a_folder_with_a_dinov2_goes_through_the_command_line(tmp_path, warm_stages, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_params(encoder=tiny_dinov2(tmp_path / "tower"), vlm=tmp_path)
    save_images(Path("data/prepared/evaluate"), pictures(), PREPARED)
    done = warm_stages.run("-m", "atr.stages.extract", "evaluate", env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    store = FeatureStore.open(
        Path("data/features/evaluate"), {"encoder": str(tmp_path / "tower"), "layer": -2}
    )
    assert store.ids == [name for name, _ in pictures()]
    assert (store.grid, store.width) == ((16, 16), 24)
    assert store[0].std() > 0 and not torch.equal(store[0], store[6])


SCRIPT = """
import sys, time
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
import atr.datasets, atr.core.tracking
from atr.stages import entry, extract
from PIL import Image

class Slow:
    def __len__(self):
        return 100
    def __getitem__(self, index):
        if index == 5:
            print("in the loop", flush=True)
        if index > 4:  # a reader's item under way is read to its end
            time.sleep(1)
        return str(index), Image.new("RGB", (56, 56))

atr.datasets.PreparedImages = lambda folder, verify: Slow()
atr.core.tracking.run = lambda *_, **__: nullcontext(SimpleNamespace())
entry("extract", partial(extract.main, split="pretrain"))
"""


def python(*arguments, **kwargs):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, *arguments], env=environment, text=True, **kwargs)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_stage_with_its_code_and_leaves_no_store(number, code, workspace):
    with python("-c", SCRIPT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert any("in the loop" in line for line in process.stdout)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in errors
    with pytest.raises(ValueError, match=r"data/features/pretrain/manifest\.json is missing"):
        FeatureStore.open(Path("data/features/pretrain"))
    assert not list(Path("data/features/pretrain").glob(".*"))


@pytest.mark.parametrize(("arguments", "code"), [(["--help"], 0), (["train"], 2), ([], 2)])
def test_the_command_line_answers_before_anything_heavy_is_imported(arguments, code, workspace):
    started = time.monotonic()
    with python(
        "-m", "atr.stages.extract", *arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as p:
        output, _ = p.communicate(timeout=60)
    assert p.returncode == code
    assert "{pretrain,evaluate}" in output
    assert time.monotonic() - started < 3


def test_wrong_parameters_end_the_command_line_with_one_line(workspace):
    write_params(shard_images=0)
    with python("-m", "atr.stages.extract", "pretrain", stderr=subprocess.PIPE) as process:
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert errors.startswith("atr extract: extract.shard_images: 0 is out of range, allowed: ")
    assert errors.count("\n") == 1
