"""The encoder against transformers' own forward, and errors of its folder."""

import json
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    Aimv2Config,
    Aimv2Model,
    Aimv2TextConfig,
    Aimv2VisionConfig,
    Aimv2VisionModel,
    BeitConfig,
    BeitModel,
    BitImageProcessorPil,
    ChineseCLIPConfig,
    ChineseCLIPModel,
    ChineseCLIPTextConfig,
    ChineseCLIPVisionConfig,
    ChineseCLIPVisionModel,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    DeiTConfig,
    DeiTModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    IJepaConfig,
    IJepaModel,
    InternVLVisionConfig,
    InternVLVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MLCDVisionConfig,
    MLCDVisionModel,
    PixioConfig,
    PixioModel,
    RadioConfig,
    RadioModel,
    Sapiens2Config,
    Sapiens2Model,
    SiglipConfig,
    SiglipModel,
    SiglipTextConfig,
    SiglipVisionConfig,
    SiglipVisionModel,
    Tipsv2VisionConfig,
    Tipsv2VisionModel,
    ViTConfig,
    ViTModel,
    ViTMSNConfig,
    ViTMSNModel,
)

from atr.features import encoder as encoder_module
from atr.features.attention_hooks import capture_attention
from atr.features.encoder import Encoder
from atr.features.vision_half import TOKEN_ENCODERS

SMALL = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "patch_size": 14,
    "image_size": 56,
}
WIDE = SMALL | {"intermediate_size": 32}
TWO_HEADS = {"num_attention_heads": 2}  # axial rotary positions turn four channels at a time
GROUPED = {"num_key_value_heads_per_layer": [2, 1, 1]}
PAIRS = {"patch_size": [14, 14], "image_size": [56, 56]}
TOWERS = {  # class, configuration, number of tokens that are not patches
    "clip": (CLIPVisionModel, CLIPVisionConfig(**WIDE), 1),
    "untrained": (CLIPVisionModel, CLIPVisionConfig(**WIDE, untrained_class_token=True), 1),
    "siglip": (SiglipVisionModel, SiglipVisionConfig(**WIDE), 0),
    "vit": (ViTModel, ViTConfig(**WIDE), 1),
    "dinov2": (Dinov2Model, Dinov2Config(**SMALL, mlp_ratio=2), 1),
    "registers": (Dinov2WithRegistersModel, Dinov2WithRegistersConfig(**SMALL, mlp_ratio=2), 5),
    "dinov3": (DINOv3ViTModel, DINOv3ViTConfig(**WIDE, num_register_tokens=2), 3),
    "aimv2": (Aimv2VisionModel, Aimv2VisionConfig(**WIDE), 0),
    "aimv2_native": (Aimv2VisionModel, Aimv2VisionConfig(**WIDE, is_native=True), 0),
    "beit": (BeitModel, BeitConfig(**WIDE, use_relative_position_bias=True), 1),
    "beit_shared": (BeitModel, BeitConfig(**WIDE, use_shared_relative_position_bias=True), 1),
    "chinese_clip": (ChineseCLIPVisionModel, ChineseCLIPVisionConfig(**WIDE), 1),
    "deit": (DeiTModel, DeiTConfig(**WIDE), 2),
    "ijepa": (IJepaModel, IJepaConfig(**WIDE), 0),
    "internvl": (InternVLVisionModel, InternVLVisionConfig(**(WIDE | PAIRS), use_qk_norm=True), 1),
    "mlcd": (MLCDVisionModel, MLCDVisionConfig(**(WIDE | TWO_HEADS)), 1),
    "pixio": (PixioModel, PixioConfig(**SMALL, mlp_ratio=2, n_cls_tokens=4), 4),
    "radio": (RadioModel, RadioConfig(**SMALL, mlp_ratio=2.0, max_img_size=112), 10),
    "sapiens2": (Sapiens2Model, Sapiens2Config(**(WIDE | TWO_HEADS), **GROUPED, num_register_tokens=2), 3),
    "tipsv2": (Tipsv2VisionModel, Tipsv2VisionConfig(**SMALL, mlp_ratio=2, num_register_tokens=2), 3),
    "vit_msn": (ViTMSNModel, ViTMSNConfig(**WIDE), 1),
}
FIRST = ("clip", "untrained", "siglip", "vit", "dinov2", "registers", "dinov3")
RESIZABLE = set(TOWERS) - {"aimv2"}


def kinds_at(*layers, others):
    """All towers at layer -2, and at the other layers the first of them; the rest of these are slow."""
    return [
        pytest.param(
            kind, layer, marks=[pytest.mark.exhaustive] if layer in others and kind not in FIRST else []
        )
        for kind in TOWERS
        for layer in (*layers, *others)
    ]


INTERPOLATED = {  # whose forward must be told to
    "clip", "untrained", "siglip", "vit", "beit", "beit_shared", "chinese_clip", "deit", "ijepa", "vit_msn",
}  # fmt: skip
UNKNOWN = (
    "altclip", "altclip_vision_model", "blip", "clipseg", "convnextv2", "dinov3_convnext", "eomt",
    "gemma4_vision",
    "hiera", "llama4_vision_model", "metaclip_2", "metaclip_2_vision_model", "mllama_vision_model", "owlvit",
    "owlv2", "qwen2_5_vl_vision", "qwen3_vl_vision", "resnet", "sam_vision_model", "smolvlm_vision", "swin",
    "videomae", "vitdet", "vjepa2", "xclip",
)  # fmt: skip
WITHIN = {  # the tower of a whole model
    "altclip": "altclip_vision_model", "blip": "blip_vision_model", "clipseg": "clipseg_vision_model",
    "metaclip_2": "metaclip_2_vision_model", "owlvit": "owlvit_vision_model", "owlv2": "owlv2_vision_model",
    "xclip": "xclip_vision_model",
}  # fmt: skip
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 8,
}


def processor(height: int = 56, width: int = 56) -> CLIPImageProcessorPil:
    size = {"height": height, "width": width}
    return CLIPImageProcessorPil(size=size, crop_size=size)


def saved(model, folder):
    torch.manual_seed(1)
    with torch.no_grad():  # initial biases are zero and norms one: make every weight matter
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    model.eval().save_pretrained(folder)
    processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llava():
    torch.manual_seed(0)
    text, vision = LlamaConfig(**TEXT), CLIPVisionConfig(**WIDE)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=1)
    return LlavaForConditionalGeneration(config)


@pytest.fixture
def folder(llava, tmp_path):
    return saved(llava, tmp_path / "llava")


def tower_in(kind, folder):
    """A tiny random tower saved in a folder, and the model itself."""
    cls, config, _ = TOWERS[kind]
    torch.manual_seed(0)
    model = cls(config)
    return str(saved(model, folder)), model


@pytest.mark.parametrize(("kind", "layer"), kinds_at(-2, others=(-3, -1, 1, 3)))
def test_features_are_the_hidden_states_of_transformers_without_extra_tokens(kind, layer, tmp_path):
    path, model = tower_in(kind, tmp_path / kind)
    pixels_BCHW = torch.randn(2, 3, 56, 56)
    encoder = Encoder.load(path, layer)
    with torch.inference_mode():
        states = model(pixels_BCHW, output_hidden_states=True).hidden_states[layer]
        torch.testing.assert_close(encoder(pixels_BCHW), states[:, TOWERS[kind][2] :], rtol=0, atol=0)
    assert (encoder.grid, encoder.width, encoder.layer, encoder.name) == ((4, 4), 24, layer, path)


@pytest.mark.parametrize(("kind", "layer"), kinds_at(-2, others=(-1, 1)))
def test_attention_and_keys_are_those_of_transformers_at_the_same_layer(kind, layer, tmp_path):
    path, model = tower_in(kind, tmp_path / kind)
    pixels_BCHW = torch.randn(2, 3, 56, 56)
    encoder = Encoder.load(path, layer)
    model.set_attn_implementation("eager")
    # hidden_states starts with the embeddings, attentions with the first layer.
    number = layer - 1 if layer > 0 else layer
    name = rf"layers?\.{range(3)[number]}\..*k_proj"
    keys = next(module for key, module in model.named_modules() if re.search(name, key))
    projected = []
    keys.register_forward_hook(lambda module, args, output: projected.append(output))
    with torch.inference_mode():
        seen = encoder.observe(pixels_BCHW, {"attention_BN", "keys_BND", "first_attention_BN"})
        whole = model(pixels_BCHW, output_attentions=True)
    extra = TOWERS[kind][2]
    for need, heads_BHTT in (
        ("attention_BN", whole.attentions[number]),
        ("first_attention_BN", whole.attentions[0]),
    ):
        has_class = extra and kind != "untrained"
        rows_BHT = heads_BHTT[:, :, 0] if has_class else heads_BHTT[:, :, extra:].sum(2) / 16
        torch.testing.assert_close(seen[need], rows_BHT.mean(1)[:, extra:], rtol=1e-5, atol=1e-7)
        assert seen[need].std() > 1e-4  # a constant would prove nothing
    # Three heads of eight channels, or two of twelve.
    chunks = projected[0][:, extra:].split(24 // model.config.num_attention_heads, dim=-1)
    torch.testing.assert_close(seen["keys_BND"], sum(chunks) / len(chunks), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "needs",
    [
        (),
        ("attention_BN",),
        ("keys_BND",),
        ("first_attention_BN",),
        ("attention_BN", "keys_BND", "first_attention_BN"),
    ],
)
def test_only_the_needed_signals_are_captured_and_features_do_not_depend_on_them(needs, tmp_path):
    encoder = Encoder.load(tower_in("dinov2", tmp_path)[0])
    pixels_BCHW = torch.randn(2, 3, 56, 56)
    features_BND = encoder(pixels_BCHW)
    seen = encoder.observe(pixels_BCHW, frozenset(needs))
    assert seen.keys() == {"features_BND", *needs}
    assert torch.equal(seen["features_BND"], features_BND)


def test_eager_attention_is_used_only_for_captured_layers_and_the_tower_is_restored(tmp_path, monkeypatch):
    encoder = Encoder.load(tower_in("siglip", tmp_path)[0])
    pixels_BCHW, tower, chosen = torch.randn(1, 3, 56, 56), encoder.tower, []
    change = tower.set_attn_implementation
    monkeypatch.setattr(tower, "set_attn_implementation", lambda name: chosen.append(name) or change(name))
    encoder(pixels_BCHW)
    hooks = [len(module._forward_hooks) for module in tower.modules()]  # transformers' own
    encoder.observe(pixels_BCHW, {"keys_BND"})
    assert chosen == []
    encoder.observe(pixels_BCHW, {"attention_BN"})
    assert chosen == ["eager", "sdpa"]
    with pytest.raises(RuntimeError):
        encoder.observe(torch.randn(1, 3, 28, 28), {"attention_BN"})
    assert tower.config._attn_implementation == "sdpa"
    assert [len(module._forward_hooks) for module in tower.modules()] == hooks


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_attention_in_bfloat16_is_close_to_float32(kind, tmp_path):
    encoder = Encoder.load(tower_in(kind, tmp_path)[0])
    pixels_BCHW, needs = torch.randn(2, 3, 56, 56), ("attention_BN", "keys_BND")
    with torch.inference_mode():
        exact = encoder.observe(pixels_BCHW, needs)
        with torch.autocast("cpu", torch.bfloat16):
            rough = encoder.observe(pixels_BCHW, needs)
            assert torch.equal(rough["features_BND"], encoder(pixels_BCHW))
    assert rough["attention_BN"].dtype == torch.float32
    torch.testing.assert_close(rough["attention_BN"], exact["attention_BN"], rtol=0.02, atol=0)
    torch.testing.assert_close(rough["keys_BND"].float(), exact["keys_BND"], rtol=0.05, atol=0.05)


def test_an_unknown_signal_is_refused_by_name(tmp_path):
    encoder = Encoder.load(tower_in("vit", tmp_path)[0])
    with pytest.raises(ValueError, match="values_BND cannot be captured, allowed: attention_BN, keys_BND"):
        encoder.observe(torch.randn(1, 3, 56, 56), {"values_BND"})


@pytest.mark.parametrize("layer", [-2, 3])
def test_attention_captured_in_a_llava_equals_that_of_its_tower(layer, folder, llava):
    encoder = Encoder.load(str(folder), layer)
    pixels_BCHW, needs = torch.randn(2, 3, 56, 56), ("attention_BN", "keys_BND", "first_attention_BN")
    with torch.inference_mode():
        alone = encoder.observe(pixels_BCHW, needs)
        with capture_attention(llava.model.vision_tower, layer, 1, 1, needs) as seen:
            llava.model.get_image_features(pixels_BCHW, vision_feature_layer=layer)
    for need in needs:
        torch.testing.assert_close(seen[need], alone[need], rtol=0, atol=0)


@pytest.mark.parametrize("layer", [-2, -1])
def test_the_tower_of_a_llava_gives_the_features_it_projects(layer, folder, llava):
    encoder = Encoder.load(str(folder), layer, name="tiny")
    pixels_BCHW = torch.randn(2, 3, 56, 56)
    with torch.inference_mode():
        projected = llava.model.multi_modal_projector(encoder(pixels_BCHW))
        expected = llava.model.get_image_features(pixels_BCHW, vision_feature_layer=layer).pooler_output
    torch.testing.assert_close(projected, torch.stack(list(expected)), rtol=0, atol=0)
    assert encoder.name == "tiny"


@pytest.mark.parametrize("layout", ["vision_tower.vision_model.", "model.vision_tower.", "vision_model."])
def test_all_checkpoint_layouts_are_read(layout, folder, llava):
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


@pytest.mark.parametrize(
    ("cls", "whole"),
    [
        (CLIPModel, CLIPConfig(text_config=CLIPTextConfig(**TEXT), vision_config=CLIPVisionConfig(**WIDE))),
        # Checkpoints of SigLIP 2 with a fixed resolution have this class too.
        (
            SiglipModel,
            SiglipConfig(text_config=SiglipTextConfig(**TEXT), vision_config=SiglipVisionConfig(**WIDE)),
        ),
        (
            Aimv2Model,
            Aimv2Config(text_config=Aimv2TextConfig(**TEXT), vision_config=Aimv2VisionConfig(**WIDE)),
        ),
        (
            ChineseCLIPModel,
            ChineseCLIPConfig(
                text_config=ChineseCLIPTextConfig(**TEXT), vision_config=ChineseCLIPVisionConfig(**WIDE)
            ),
        ),
    ],
)
def test_tower_inside_a_model_of_images_and_text_is_read(cls, whole, tmp_path):
    torch.manual_seed(0)
    model = cls(whole)
    encoder = Encoder.load(str(saved(model, tmp_path)), -2)
    pixels_BCHW = torch.randn(2, 3, 56, 56)
    with torch.inference_mode():
        states = model.vision_model(pixels_BCHW, output_hidden_states=True).hidden_states[-2]
        torch.testing.assert_close(encoder(pixels_BCHW), states[:, -16:], rtol=0, atol=0)


def test_grid_is_that_of_the_processed_image(tmp_path):
    path, _ = tower_in("dinov2", tmp_path)
    processor(height=84, width=42).save_pretrained(path)  # DINOv2 interpolates its positions
    encoder = Encoder.load(path)
    pixels_BCHW = encoder.preprocess([Image.new("RGB", (100, 200))])
    assert encoder.grid == (6, 3)
    assert encoder(pixels_BCHW).shape == (1, 18, 24)


@pytest.mark.parametrize(
    "kind",
    [
        kind if kind in FIRST else pytest.param(kind, marks=pytest.mark.exhaustive)
        for kind in sorted(RESIZABLE)
    ],
)
def test_another_size_resizes_images_and_interpolates_positions(kind, tmp_path):
    path, model = tower_in(kind, tmp_path)
    encoder = Encoder.load(path, -2, size=(84, 42))
    pixels_BCHW = encoder.preprocess([Image.effect_noise((100, 90), 90).convert("RGB")])
    options = {"interpolate_pos_encoding": True} if kind in INTERPOLATED else {}
    with torch.inference_mode():
        states = model(pixels_BCHW, output_hidden_states=True, **options).hidden_states[-2]
        seen = encoder.observe(pixels_BCHW, {"attention_BN"})
    assert (encoder.grid, pixels_BCHW.shape) == ((6, 3), (1, 3, 84, 42))
    torch.testing.assert_close(seen["features_BND"], states[:, TOWERS[kind][2] :], rtol=1e-5, atol=1e-6)
    assert seen["attention_BN"].shape == (1, 18)


def test_a_tower_for_oblong_images_needs_no_interpolation(tmp_path):
    model = ViTModel(ViTConfig(**(WIDE | {"image_size": [84, 42]})))
    path = str(saved(model, tmp_path))
    encoder = Encoder.load(path, size=(84, 42))
    pixels_BCHW = torch.randn(1, 3, 84, 42)
    with torch.inference_mode():
        states = model(pixels_BCHW, output_hidden_states=True).hidden_states[-2]
        torch.testing.assert_close(encoder(pixels_BCHW), states[:, 1:], rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"refuses the 56 x 56 pixels .*, allowed: \[84, 42\]"):
        Encoder.load(path)


def test_a_size_resizes_the_whole_image_without_cropping(tmp_path):
    path, _ = tower_in("dinov2", tmp_path)
    size = {"shortest_edge": 80}
    BitImageProcessorPil(size=size, crop_size={"height": 56, "width": 56}).save_pretrained(path)
    framed = Image.new("RGB", (200, 100), "black")
    framed.paste((255, 255, 255), (10, 10, 190, 90))
    cropped = Encoder.load(path).preprocess([framed])
    whole = Encoder.load(path, size=56).preprocess([framed])
    assert cropped.shape == whole.shape == (1, 3, 56, 56)
    corners = (..., slice(0, None, 55), slice(0, None, 55))
    assert (whole[corners] < 0).all() and (cropped[corners] > 0).all()


def test_preprocess_uses_the_folders_processor_and_is_pickled_without_the_tower(folder):
    encoder = Encoder.load(str(folder))
    images = [Image.effect_noise((70, 60), 80).convert("RGB"), Image.new("RGB", (56, 56), "red")]
    pickled = pickle.dumps(encoder.preprocess)
    expected = processor()(images, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pickle.loads(pickled)(images), expected, rtol=0, atol=0)
    assert len(pickled) < 10_000


@pytest.mark.parametrize("layer", [0, 4, -4])
def test_a_missing_layer_is_refused(layer, folder):
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


def test_weights_of_unused_layers_may_be_missing(folder):
    edit(folder, lambda weights: [weights.pop(key) for key in list(weights) if ".layers.2." in key])
    assert Encoder.load(str(folder), -2).layer == -2
    refused(folder, "first encoder.layers.2", layer=-1)


def test_used_weights_that_are_not_finite_are_named(folder):
    edit(folder, lambda weights: weights["vision_tower.encoder.layers.2.mlp.fc1.bias"].fill_(torch.nan))
    assert Encoder.load(str(folder), -2).layer == -2
    name = r"first encoder\.layers\.2\.mlp\.fc1\.bias"
    refused(folder, rf"llava/model.safetensors: 1 of \d+ tensors hold NaN or infinity, {name}", layer=-1)


def test_weights_of_another_shape_are_named(folder):
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
        (
            "config.json",
            '{"model_type": "llama"}',
            "llava: llama is not a supported vision tower, allowed",
        ),
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


def test_a_missing_folder_is_named(tmp_path):
    refused(tmp_path / "nowhere", "nowhere: there is no such folder")


@pytest.mark.parametrize("kind", ["clip", "siglip", "vit"])
def test_a_processor_of_another_size_is_refused(kind, tmp_path):
    path, _ = tower_in(kind, tmp_path / kind)
    processor(height=28, width=28).save_pretrained(path)
    refused(
        path, rf"{kind}: the tower refuses the 28 x 28 pixels that its image processor gives, allowed: 56"
    )


def test_a_processor_that_gives_images_different_sizes_is_refused(folder):
    CLIPImageProcessorPil(size={"shortest_edge": 56}, do_center_crop=False).save_pretrained(folder)
    refused(
        folder, r"llava: its image processor gives .* \(56, 84\) and \(84, 56\), allowed: one size for all"
    )


@pytest.mark.parametrize(
    ("pattern", "kwargs"),
    [
        ("there is no layer 4", {"layer": 4}),
        ("refuses the 7 x 7 pixels", {"size": 7}),  # less than a patch
    ],
)
def test_a_wrong_layer_or_size_is_refused_before_any_weight_is_read(pattern, kwargs, folder):
    (folder / "model.safetensors").unlink()
    refused(folder, pattern, **kwargs)
    refused(folder, "no readable weights", layer=3, size=28)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("vit_mae", ", as it shuffles the patches anew in each forward"),
        ("pixtral", ", as it gives several images as one sequence"),
        ("data2vec-vision", ", as it keeps its attention where no hook can read it"),
        ("gemma4", ""),  # by default its configuration has no tower
        # Types that AutoModel does not know, or whose configurations lack depth, channels or patch size.
        *((kind, "") for kind in UNKNOWN),
    ],
)
def test_other_towers_are_refused_before_any_weight_is_read(kind, reason, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    kind = WITHIN.get(kind, kind)
    refused(tmp_path, rf"{tmp_path.name}: {kind} is not a supported vision tower{reason}, allowed: clip_")


@pytest.mark.parametrize("tower", ["pixtral", "vit_mae"])
def test_a_refused_tower_within_a_llava_is_named(tower, tmp_path):
    config = {"model_type": "llava", "vision_config": {"model_type": tower}, "text_config": TEXT}
    (tmp_path / "config.json").write_text(json.dumps(config | {"text_config": {"model_type": "llama"}}))
    refused(tmp_path, rf"{tmp_path.name}: {tower} is not a supported vision tower, as it")


@pytest.mark.parametrize("layer", ["merged", "last"])
def test_a_tower_alone_has_no_merged_tokens(layer, folder):
    allowed = "llava has no merged tokens, allowed: an int" if layer == "merged" else "allowed: int, 'merged'"
    refused(folder, allowed, layer=layer)


def test_a_tower_of_one_grid_gives_images_one_by_one_as_well(folder):
    encoder = Encoder.load(str(folder))
    pixels_BCHW = torch.randn(3, 3, 56, 56)
    features, grids = zip(*encoder.images(pixels_BCHW), strict=True)
    assert torch.equal(torch.stack(features), encoder(pixels_BCHW))
    assert (encoder.is_ragged, grids) == (False, (encoder.grid,) * 3)


def test_the_extra_tokens_of_the_configuration_are_measured(folder, monkeypatch):
    monkeypatch.setitem(encoder_module.CLASS_TOKENS, "clip_vision_model", 0)
    refused(folder, "llava: 17 tokens are not 0 and 4 x 4 patches")


def test_loading_restores_the_verbosity_of_transformers(folder):
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    Encoder.load(str(folder))
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_the_page_of_encoders_lists_every_type_and_its_tokens():
    page = Path(__file__).parents[2].joinpath("docs/encoders.md").read_text()
    towers, _, rest = page.partition("## SigLIP 2 NaFlex")
    listed = dict(re.findall(r"^\| `(\S+)` \| `?(\w+)`? \|", towers, flags=re.MULTILINE))
    assert listed == {kind: str(count) for kind, count in encoder_module.CLASS_TOKENS.items()}
    registers = dict(re.findall(r"^\| `(\S+)` \| \S+ \| (\S+)", towers, flags=re.MULTILINE))
    with_registers = {model.config_class.model_type for model, _, extra in TOWERS.values() if extra > 1}
    assert {kind for kind, count in registers.items() if count != "0"} == with_registers - {"pixio"}
    assert re.findall(r"^\| `(\S+)` \|", rest, flags=re.MULTILINE) == list(TOKEN_ENCODERS)
    for kind in encoder_module._REFUSED:
        assert f"- `{kind}` " in rest
