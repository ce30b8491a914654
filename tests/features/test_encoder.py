"""The encoder against transformers' own forward, and every way its folder can be wrong."""

import pickle
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

from atr.features.encoder import Encoder

SMALL = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "patch_size": 14,
    "image_size": 56,
}
WIDE = SMALL | {"intermediate_size": 32}
TOWERS = {  # class, its configuration, tokens that are no patches
    "clip": (CLIPVisionModel, CLIPVisionConfig(**WIDE), 1),
    "siglip": (SiglipVisionModel, SiglipVisionConfig(**WIDE), 0),
    "vit": (ViTModel, ViTConfig(**WIDE), 1),
    "dinov2": (Dinov2Model, Dinov2Config(**SMALL, mlp_ratio=2), 1),
    "registers": (Dinov2WithRegistersModel, Dinov2WithRegistersConfig(**SMALL, mlp_ratio=2), 5),
}


def processor(height: int = 56, width: int = 56) -> CLIPImageProcessorPil:
    size = {"height": height, "width": width}
    return CLIPImageProcessorPil(size=size, crop_size=size)


def saved(model, folder):
    torch.manual_seed(1)
    with torch.no_grad():  # fresh biases are zero and fresh norms one: give every weight a say
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    model.eval().save_pretrained(folder)
    processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llava():
    torch.manual_seed(0)
    text = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=8
    )
    config = LlavaConfig(vision_config=CLIPVisionConfig(**WIDE), text_config=text, image_token_index=1)
    return LlavaForConditionalGeneration(config)


@pytest.fixture
def folder(llava, tmp_path):
    return saved(llava, tmp_path / "llava")


@pytest.mark.parametrize("layer", [-3, -2, -1, 1, 3])
@pytest.mark.parametrize("kind", TOWERS)
def test_features_are_the_hidden_states_of_transformers_without_extra_tokens(kind, layer, tmp_path):
    cls, config, extra = TOWERS[kind]
    torch.manual_seed(0)
    model = cls(config)
    path = str(saved(model, tmp_path / kind))
    pixels_BCHW = torch.randn(2, 3, 56, 56)
    encoder = Encoder.load(path, layer)
    with torch.inference_mode():
        expected = model(pixels_BCHW, output_hidden_states=True).hidden_states[layer][:, extra:]
        torch.testing.assert_close(encoder(pixels_BCHW), expected, rtol=0, atol=0)
    assert (encoder.grid, encoder.width, encoder.layer, encoder.name) == ((4, 4), 24, layer, path)


@pytest.mark.parametrize("layer", [-2, -1])
def test_tower_inside_llava_gives_what_llava_projects(layer, folder, llava):
    encoder = Encoder.load(str(folder), layer, name="tiny")
    pixels_BCHW = torch.randn(2, 3, 56, 56)
    with torch.inference_mode():
        projected = llava.model.multi_modal_projector(encoder(pixels_BCHW))
        expected = llava.model.get_image_features(pixels_BCHW, vision_feature_layer=layer).pooler_output
    torch.testing.assert_close(projected, torch.stack(list(expected)), rtol=0, atol=0)
    assert encoder.name == "tiny"


@pytest.mark.parametrize("layout", ["vision_tower.vision_model.", "model.vision_tower.", "vision_model."])
def test_every_layout_of_the_tower_in_a_checkpoint_is_read(layout, folder, llava):
    weights = load_file(folder / "model.safetensors")
    moved = {key.replace("vision_tower.", layout): weight for key, weight in weights.items()}
    save_file(moved, folder / "model.safetensors", metadata={"format": "pt"})
    state = Encoder.load(str(folder), -1).tower.state_dict()
    expected = llava.model.vision_tower.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in state)


def test_only_the_layers_that_are_read_are_kept_and_frozen(folder):
    encoder = Encoder.load(str(folder), -2)
    assert len(encoder.tower.encoder.layers) == 2
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not encoder.tower.training
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}


def test_half_precision_weights_are_computed_in_float32(folder):
    weights = {key: weight.bfloat16() for key, weight in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert {weight.dtype for weight in Encoder.load(str(folder)).parameters()} == {torch.float32}


def test_grid_is_that_of_the_processed_image(tmp_path):
    folder = saved(Dinov2Model(TOWERS["dinov2"][1]), tmp_path)
    processor(height=84, width=42).save_pretrained(folder)  # DINOv2 interpolates its positions
    encoder = Encoder.load(str(folder))
    pixels_BCHW = encoder.preprocess([Image.new("RGB", (100, 200))])
    assert encoder.grid == (6, 3)
    assert encoder(pixels_BCHW).shape == (1, 18, 24)


def test_preprocess_is_the_folders_processor_and_pickles_without_the_tower(folder):
    encoder = Encoder.load(str(folder))
    images = [Image.effect_noise((70, 60), 80).convert("RGB"), Image.new("RGB", (56, 56), "red")]
    pickled = pickle.dumps(encoder.preprocess)
    expected = processor()(images, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pickle.loads(pickled)(images), expected, rtol=0, atol=0)
    assert len(pickled) < 10_000


@pytest.mark.parametrize("layer", [0, 4, -4])
def test_a_layer_that_is_not_there_is_refused(layer, folder):
    with pytest.raises(ValueError, match=rf"llava: there is no layer {layer}, allowed: 1 to 3, or -3 to -1"):
        Encoder.load(str(folder), layer)


def edit(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def refused(folder, pattern, **kwargs):
    with pytest.raises(ValueError, match=pattern) as refusal:
        Encoder.load(str(folder), **kwargs)
    assert "\n" not in str(refusal.value)


def test_missing_weights_are_named(folder):
    key = "vision_tower.encoder.layers.1.mlp.fc1.weight"
    edit(folder, lambda weights: weights.pop(key))
    refused(
        folder, r"llava/model.safetensors: lacks 1 weights .*, first encoder\.layers\.1\.mlp\.fc1\.weight"
    )


def test_weights_of_layers_that_are_not_read_may_be_missing(folder):
    edit(folder, lambda weights: [weights.pop(key) for key in list(weights) if ".layers.2." in key])
    assert Encoder.load(str(folder), -2).layer == -2
    refused(folder, "first encoder.layers.2", layer=-1)


def test_misshapen_weights_are_named(folder):
    key = "embeddings.position_embedding.weight"
    edit(folder, lambda weights: weights.update({f"vision_tower.{key}": torch.zeros(3, 24)}))
    refused(folder, rf"model.safetensors: {key} has shape \(3, 24\).* \(17, 24\)")


def test_truncated_weights_are_named(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused(folder, "llava/model.safetensors: no readable weights")


def test_weights_of_another_model_are_refused(folder, tmp_path):
    saved(SiglipVisionModel(TOWERS["siglip"][1]), tmp_path / "other")
    shutil.copy(tmp_path / "other/model.safetensors", folder)
    refused(folder, "model.safetensors: ")


@pytest.mark.parametrize(
    ("file", "content", "pattern"),
    [
        ("config.json", None, "llava: no readable model configuration"),
        ("config.json", "{", "llava: no readable model configuration"),
        ("config.json", '{"model_type": "llama"}', "llava: llama is not a plain vision transformer"),
        ("model.safetensors", None, "llava: no readable weights"),
        ("model.safetensors", "version https://git-lfs", "model.safetensors: no readable weights"),
        ("preprocessor_config.json", None, "llava: no readable image processor"),
    ],
)
def test_broken_folders_are_named(file, content, pattern, folder):
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_text(content)
    refused(folder, pattern)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    refused(tmp_path / "nowhere", "nowhere: there is no such folder")


def test_a_processor_of_another_size_is_refused(folder):
    processor(height=28, width=28).save_pretrained(folder)
    refused(folder, "llava: the tower refuses its own processor's images")


def test_loading_leaves_transformers_as_talkative_as_it_was(folder):
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    Encoder.load(str(folder))
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
