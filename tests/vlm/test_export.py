"""The exported graphs keep the tokens that `reduce` keeps, in every engine that is installed."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from PIL import Image

from atr.core.fingerprint import fingerprint
from atr.features.merged import vision_tower
from atr.micro import world
from atr.reduction import FeatureSelector
from atr.vlm import export as module
from atr.vlm.checkpoint import load_vlm
from atr.vlm.export import FILES, OPSET, OUTPUTS, export_vision, load_exported
from atr.vlm.reduce import reduce

MICRO = Path(__file__).parents[2] / "data/micro"
FORMATS = [
    pytest.param("torch", id="torch"),
    *(
        pytest.param(
            name,
            id=name,
            marks=pytest.mark.skipif(
                not all(map(find_spec, ("onnxscript", package))), reason="the extra export is not installed"
            ),
        )
        for name, package in (("onnx", "onnxruntime"), ("openvino", "openvino"))
    ),
]
in_every_format = pytest.mark.parametrize("to", FORMATS)
of_both_kinds = pytest.mark.parametrize("record", [{}, {"taught_by": "tiny"}], ids=["selector", "distilled"])


class CoarseSelector(FeatureSelector):
    """Logits of few values, so that most tokens are tied."""

    def forward(self, features_BND, grid=None):
        return (super().forward(features_BND, grid) / 8).round()


@pytest.fixture
def vlm(tmp_path, model, processor):
    model.save_pretrained(tmp_path / "vlm")
    processor.save_pretrained(tmp_path / "vlm")
    return str(tmp_path / "vlm")


def write_selector(folder, grid=(4, 4), **record):
    torch.manual_seed(3)
    selector = FeatureSelector(24, grid, layers=1, heads=2, layer=-2, record=record)
    torch.nn.init.normal_(selector.trunk.head.weight)
    selector.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def selector(tmp_path, model):
    return write_selector(tmp_path / "selector", fingerprint=fingerprint(vision_tower(model)))


def pictures(count):
    generator = torch.Generator().manual_seed(5)
    pixels = torch.randint(0, 256, (count, 30, 40, 3), generator=generator, dtype=torch.uint8)
    return [Image.fromarray(pixels_HWC.numpy()) for pixels_HWC in pixels]


def assert_as_reduced(vlm, selector, folder, to, images, text, batch, keep):
    """Indices equal, tokens up to rounding, in batches and one by one."""
    model, processor = load_vlm(vlm, torch.float32)
    inputs = processor(images=images, text=[text] * len(images), return_tensors="pt")
    reduced = reduce(model, inputs, selector, keep)
    expected = torch.stack([kept.indices_K for kept in reduced.kept])
    tokens = torch.stack(list(reduced["mm_encoder_outputs"]["image"].pooler_output))
    run = load_exported(folder, to)
    for size in (batch, 1):
        parts = [run(pixels_BCHW) for pixels_BCHW in inputs["pixel_values"].split(size)]
        features, kept = (torch.cat(values) for values in zip(*parts, strict=True))
        assert torch.equal(kept, expected)
        torch.testing.assert_close(features, tokens, rtol=1e-4, atol=1e-4)


@in_every_format
@of_both_kinds
def test_a_graph_keeps_the_tokens_that_reduce_keeps(tmp_path, vlm, to, record):
    selector = write_selector(tmp_path / "selector", **record)
    exported = export_vision(vlm, selector, 0.4, to, tmp_path / "out")
    assert (exported.kept, exported.of) == (6, 16)
    loaded = FeatureSelector.from_pretrained(selector)
    assert_as_reduced(vlm, loaded, tmp_path / "out", to, pictures(7), "<image> a b", 3, 0.4)


@in_every_format
@of_both_kinds
def test_ties_go_to_the_lower_index(tmp_path, vlm, monkeypatch, to, record):
    monkeypatch.setattr(module, "FeatureSelector", CoarseSelector)
    selector = write_selector(tmp_path / "selector", **record)
    export_vision(vlm, selector, 7, to, tmp_path / "out")
    coarse = CoarseSelector.from_pretrained(selector)
    features = torch.randn(9, 16, 24, generator=torch.Generator().manual_seed(2))
    assert len(coarse(features).unique()) <= 4, "too few ties"
    assert_as_reduced(vlm, coarse, tmp_path / "out", to, pictures(9), "<image> a", 4, 7)


def test_the_folder_says_what_was_exported(tmp_path, vlm, selector):
    exported = export_vision(vlm, selector, 1, "torch", tmp_path / "out")
    settings = json.loads((tmp_path / "out/export.json").read_text())
    assert settings["kept"] == 1 and settings["of"] == 16 and settings["pixels"] == [3, 28, 28]
    program = torch.export.load(tmp_path / "out" / FILES["torch"])
    parts = (exported.model.model.vision_tower, exported.model.model.multi_modal_projector, exported.selector)
    weights = sum(weight.numel() for part in parts for weight in part.parameters())
    assert sum(weight.numel() for weight in program.parameters()) == weights, "a language model is in it"


@pytest.mark.parametrize("to", FORMATS[1:2])
def test_the_file_states_its_opset(tmp_path, vlm, selector, to):
    onnx = pytest.importorskip("onnx")
    export_vision(vlm, selector, 0.5, to, tmp_path / "out")
    graph = onnx.load(tmp_path / "out" / FILES[to])
    assert [(each.domain, each.version) for each in graph.opset_import] == [("", OPSET)]
    assert [each.name for each in graph.graph.output] == list(OUTPUTS)


@pytest.mark.parametrize(
    ("keep", "to", "message"),
    [
        ("adaptive", "torch", "keep: 'adaptive' is not allowed in a graph, allowed: a fraction or a count"),
        ("most", "torch", "keep: 'most' is not allowed in a graph"),
        (1.5, "torch", "keep: 1.5 is out of range"),
        (17, "torch", "keep: 17 is out of range, allowed: a count of 0 to 16 tokens"),
        (0, "torch", "keep: 0 leaves no visual token"),
        (float("nan"), "torch", "keep: nan is out of range"),
        (0.5, "tflite", "to: 'tflite' is unknown, allowed: torch, onnx, openvino"),
    ],
)
def test_wrong_settings_are_refused_before_the_model_is_read(
    tmp_path, vlm, selector, monkeypatch, keep, to, message
):
    monkeypatch.setattr(module, "load_vlm", None)
    with pytest.raises(ValueError, match=message) as raised:
        export_vision(vlm, selector, keep, to, tmp_path / "out")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_exists_is_left_alone(tmp_path, vlm, selector):
    with pytest.raises(ValueError, match="selector exists, allowed: a new folder"):
        export_vision(vlm, selector, 0.5, "torch", tmp_path / "selector")
    FeatureSelector.from_pretrained(selector)


@pytest.mark.parametrize(
    ("to", "package"), [("onnx", "onnxscript"), ("onnx", "onnxruntime"), ("openvino", "openvino")]
)
def test_a_missing_package_is_named_with_its_extra(tmp_path, vlm, selector, monkeypatch, to, package):
    monkeypatch.setattr(module, "_PACKAGES", {to: (package,)})
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"^{package} cannot be imported .* of the extra atr\[export\]"):
        export_vision(vlm, selector, 0.5, to, tmp_path / "out")


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
def test_another_family_is_refused_by_name(tmp_path, vlm, selector, family):
    with pytest.raises(ValueError, match=f"model type '{family}' is not exported, allowed: llava"):
        export_vision(vlm, selector, 0.5, "torch", tmp_path / "out")


def test_a_selector_of_another_tower_is_refused(tmp_path, vlm):
    other = write_selector(tmp_path / "other", fingerprint="f" * 64)
    with pytest.raises(ValueError, match="whose weights are not those of the vision tower"):
        export_vision(vlm, other, 0.5, "torch", tmp_path / "out")
    small = write_selector(tmp_path / "small", grid=(3, 4))
    with pytest.raises(ValueError, match=r"\[3, 4, 24\] \(rows, columns, width\)"):
        export_vision(vlm, small, 0.5, "torch", tmp_path / "out")


def test_a_failed_export_leaves_nothing(tmp_path, vlm, selector, monkeypatch):
    def fail(program, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.export, "save", fail)
    with pytest.raises(OSError, match="No space left"):
        export_vision(vlm, selector, 0.5, "torch", tmp_path / "new/out")
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.exhaustive
@in_every_format
@pytest.mark.parametrize("kind", ["selector", "distilled"])
def test_trained_selectors_keep_the_same_tokens_of_200_images(tmp_path, to, kind):
    vlm, selector = str(MICRO / "llava"), str(MICRO / "selectors" / kind)
    export_vision(vlm, selector, 0.4, to, tmp_path / "out")
    names = ("docs", "signs", "charts", "shapes", "digits", "scenes")
    images = [world.sample(names[i % 6], "evaluate", i // 6, seed=0).image for i in range(200)]
    loaded = FeatureSelector.from_pretrained(selector)
    assert_as_reduced(vlm, loaded, tmp_path / "out", to, images, "<image> price", 32, 0.4)
