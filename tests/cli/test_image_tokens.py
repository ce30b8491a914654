"""Tokens per image against the real processors and models."""

import json
import random

import pytest
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen3VLConfig,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from atr.cli.image_tokens import FeatureShape, NativeResolution, features_of, resolution_of
from atr.config.presets import ENCODERS, EncoderPreset
from atr.features.encoder import Encoder

PHOTOGRAPH = (640, 480)


def of_folder(path, layer=None):
    return features_of(EncoderPreset(str(path), str(path)), layer, PHOTOGRAPH)


@pytest.mark.parametrize(
    ("name", "image", "hundred_thousand"),
    [("clip-vit-large-patch14-336", 1.18, 118), ("siglip-so400m-patch14-384", 1.68, 168)],
)
def test_stored_features_have_the_papers_size(name, image, hundred_thousand):
    features = features_of(ENCODERS[name], None, PHOTOGRAPH)
    assert round(features.bytes / 1e6, 2) == image
    assert round(100_000 * features.bytes / 1e9) == hundred_thousand


@pytest.mark.parametrize("name", [name for name in ENCODERS if name != "micro"])
def test_every_preset_on_the_hub_is_known(name):
    preset = ENCODERS[name]
    assert features_of(preset, None, PHOTOGRAPH).width == preset.width
    assert (resolution_of(preset) is not None) == (preset.max_pixels is not None)
    if preset.layer == "merged":
        merged, patches = (features_of(preset, layer, PHOTOGRAPH) for layer in ("merged", -2))
        assert (merged.tokens, merged.width, patches.width) == (
            patches.tokens, preset.width, preset.patch_width,
        )  # fmt: skip


SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 32}
CROP = {"crop_size": {"height": 42, "width": 42}, "size": {"shortest_edge": 48}}


@pytest.mark.parametrize(
    ("model", "settings", "processor"),
    [
        (
            CLIPVisionModel,
            CLIPVisionConfig(**SMALL, patch_size=14, image_size=42),
            CLIPImageProcessorPil(**CROP),
        ),
        (
            SiglipVisionModel,
            SiglipVisionConfig(**SMALL, patch_size=16, image_size=72),
            SiglipImageProcessorPil(size={"height": 72, "width": 72}),
        ),
    ],
)
def test_a_folder_is_read_as_the_encoder_finds_it(tmp_path, model, settings, processor):
    model(settings).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    encoder = Encoder.load(str(tmp_path))
    rows, columns = encoder.grid
    assert of_folder(tmp_path) == FeatureShape(rows * columns, encoder.width)


def test_the_shipped_model_is_read_from_its_folder(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)
    assert features_of(ENCODERS["micro"], None, PHOTOGRAPH) == FeatureShape(144, 192)


@pytest.mark.parametrize("content", [None, "{}", "{", '{"vision_config": {"image_size": 28}}'])
def test_what_is_no_encoder_is_unknown(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    assert of_folder(tmp_path) is None and resolution_of(EncoderPreset("x", str(tmp_path))) is None
    assert of_folder("some/tower") is None


@pytest.mark.parametrize(
    ("patch", "least", "most"), [(14, 3_136, 12_845_056), (16, 65_536, 90_000), (14, 1, 800)]
)
def test_tokens_are_those_that_the_processor_counts(patch, least, most):
    processor = Qwen2VLImageProcessorPil(patch_size=patch, min_pixels=least, max_pixels=most)
    resolution = NativeResolution(2 * patch, least, most)
    draw = random.Random(patch)
    for _ in range(2000):
        width = int(10 ** draw.uniform(0.5, 3.7))
        height = max(1, int(width * 10 ** draw.uniform(-1.5, 1.5)))
        count = resolution.tokens(width, height)
        assert count == processor.get_number_of_image_patches(height, width) // 4, (width, height)


def test_the_bounds_in_tokens_are_met_by_squares_and_exceeded_by_none():
    resolution = NativeResolution(28, 256 * 28**2, 2_048 * 28**2)
    assert (resolution.fewest, resolution.largest) == (256, 2_048)
    assert resolution.tokens(8, 8) == 256
    assert max(resolution.tokens(16 * step, 9_000) for step in range(4, 400)) <= 2_048
    assert resolution.tokens(2 * 32 * 280, 32 * 280) == 2_048


@pytest.mark.parametrize("kind", [Qwen2VLConfig, Qwen2_5_VLConfig, Qwen3VLConfig])
@pytest.mark.parametrize("stated", ["pixels", "size"])
def test_a_folder_of_native_resolution_is_read_with_its_processors_bounds(tmp_path, kind, stated):
    text = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 1}
    sizes = {"patch_size": 14, "spatial_merge_size": 2}
    tower = {"embed_dim": 48, "hidden_size": 64} if kind is Qwen2VLConfig else {"hidden_size": 48}
    kind(text_config=text, vision_config=sizes | tower).save_pretrained(tmp_path)
    bounds = (
        {"min_pixels": 784, "max_pixels": 78_400}
        if stated == "pixels"
        else {"size": {"shortest_edge": 784, "longest_edge": 78_400}}
    )
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(bounds))
    preset = EncoderPreset("own", str(tmp_path))
    assert resolution_of(preset) == NativeResolution(28, 784, 78_400)
    tokens = NativeResolution(28, 784, 78_400).tokens(*PHOTOGRAPH)
    assert of_folder(tmp_path, "merged") == FeatureShape(tokens, 64)
    assert of_folder(tmp_path, -1) == of_folder(tmp_path) == FeatureShape(tokens, 48)
    bounded = EncoderPreset("own", str(tmp_path), max_pixels=7_840)
    assert resolution_of(bounded) == NativeResolution(28, 784, 7_840)
