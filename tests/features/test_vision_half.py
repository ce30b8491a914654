"""Encoders of merged tokens, of pooled patches and of NaFlex images, against transformers' own forward."""

import json
from copy import deepcopy

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Siglip2Config,
    Siglip2ImageProcessorPil,
    Siglip2Model,
    Siglip2VisionConfig,
    Siglip2VisionModel,
)

from atr.core.fingerprint import fingerprint, is_same_tower
from atr.features import encoder as encoder_module
from atr.features.attention_hooks import tower_layer
from atr.features.encoder import Encoder
from atr.features.merged import image_features, pooled_states, token_grids, vision_tower
from atr.features.preprocess import probe_image
from atr.features.vision_half import in_passes

ONE_SIZE = ("gemma3", "paligemma", "internvl", "smolvlm", "idefics3")
RAGGED = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "gemma4", "mistral3")
FAST = ("gemma3", "smolvlm", "qwen2_5_vl", "qwen3_vl", "gemma4", "mistral3")
"""Each way of merging, and of passing tiles."""


def first(kinds):
    """The kinds, all but those in FAST for the slow run."""
    return [kind if kind in FAST else pytest.param(kind, marks=pytest.mark.exhaustive) for kind in kinds]


EXPERTS = ("qwen3_vl_moe", "qwen3_5_moe")
NAFLEX = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "patch_size": 14,
    "num_patches": 16,
}


def pictures(*sizes):
    """Pictures of (width, height) pixels, the same in each call."""
    return [probe_image(*size) for size in sizes or ((90, 60), (40, 110), (64, 64))]


def outputs(model, inputs):
    """get_image_features, one entry for each image."""
    tokens = image_features(model, inputs).pooler_output
    flat = torch.cat([value.reshape(-1, value.shape[-1]) for value in tokens])
    return flat.split([rows * columns for rows, columns in token_grids(model, inputs)])


def same(one, other, atol=0.0):
    for left, right in zip(one, other, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=atol)


@pytest.mark.parametrize("kind", first([*ONE_SIZE, *RAGGED, *EXPERTS]))
@torch.inference_mode()
def test_merged_tokens_are_those_of_the_model(kind, hosts):
    """Together and one by one, in the grid of each image."""
    model, folder = hosts(kind)
    encoder = Encoder.load(str(folder), "merged", "tiny")
    inputs = encoder.image_processor(pictures(), return_tensors="pt")
    seen = encoder.images(encoder.preprocess(pictures()))
    features, grids = zip(*seen, strict=True)
    assert [len(image) for image in features] == [rows * columns for rows, columns in grids]
    assert (encoder.is_ragged, encoder.width, encoder.layer, encoder.name) == (
        kind not in ONE_SIZE, features[0].shape[1], "merged", "tiny",
    )  # fmt: skip
    assert len(set(grids)) == (1 if kind in ONE_SIZE else 3)
    # Without bits of difference, unless several images are a batch of rows there and one row here.
    same(features, outputs(model, inputs), 0 if kind not in ("smolvlm", "idefics3") else 1e-6)
    for image, (alone, grid) in zip(pictures(), seen, strict=True):
        ((one, its_grid),) = encoder.images(encoder.preprocess([image]))
        assert its_grid == grid
        torch.testing.assert_close(one, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", first([*ONE_SIZE, *RAGGED, *EXPERTS]))
@torch.inference_mode()
def test_states_of_a_layer_are_those_of_the_model_by_token(kind, hosts):
    model, folder = hosts(kind)
    encoder = Encoder.load(str(folder), -2)
    inputs = encoder.image_processor(pictures(), return_tensors="pt")
    features, grids = zip(*encoder.images(encoder.preprocess(pictures())), strict=True)
    same(features, pooled_states(model, inputs, 2), 0 if kind not in ("smolvlm", "idefics3") else 1e-6)
    assert list(grids) == token_grids(model, inputs)
    assert encoder.width == features[0].shape[1]


@pytest.mark.parametrize("layer", ["merged", 2])
@torch.inference_mode()
def test_images_of_one_grid_are_features_in_a_batch(layer, hosts):
    encoder = Encoder.load(str(hosts("internvl")[1]), layer)
    pixels_BCHW = encoder.preprocess(pictures())
    features_BND = encoder(pixels_BCHW)
    assert features_BND.shape == (3, 9, encoder.width) and encoder.grid == (3, 3)
    same(features_BND, [features_ND for features_ND, _ in encoder.images(pixels_BCHW)])
    assert encoder.observe(pixels_BCHW, ()).keys() == {"features_BND"}


@pytest.mark.parametrize("kind", first(["gemma3", "internvl", "smolvlm"]))
@pytest.mark.parametrize("layer", ["merged", 2])
@torch.inference_mode()
def test_attention_and_keys_of_a_token_are_the_means_of_its_patches(layer, kind, hosts):
    """Against the tower's own eager attention weights, and its key projection."""
    encoder = Encoder.load(str(hosts(kind)[1]), layer)
    for name, weight in encoder.tower.named_parameters():
        if "q_proj" in name:
            weight.mul_(50)  # attention that is far from uniform
    pixels_BCHW = encoder.preprocess(pictures())
    seen = encoder.observe(pixels_BCHW, {"attention_BN", "keys_BND", "first_attention_BN"})
    tower, extra, side = deepcopy(encoder.tower), int(kind == "internvl"), encoder.grid[0]
    tower.set_attn_implementation("eager")
    number, projected = (3 if layer == "merged" else 2) - 1, []
    module = next(m for m in tower_layer(tower, number + 1).modules() if hasattr(m, "k_proj"))
    module.k_proj.register_forward_hook(lambda module, args, output: projected.append(output))
    attentions = tower(pixels_BCHW, output_attentions=True).attentions
    assert torch.equal(seen["features_BND"], encoder(pixels_BCHW))
    for need, weights_BHTT in (
        ("attention_BN", attentions[number]),
        ("first_attention_BN", attentions[0]),
    ):
        rows_BHT = weights_BHTT[:, :, 0] if extra else weights_BHTT.mean(2)
        expected = by_token(rows_BHT.mean(1)[:, extra:, None], side)[..., 0]
        torch.testing.assert_close(seen[need], expected, rtol=1e-4, atol=1e-6)
        assert seen[need].std() > 1e-4
    keys_BTD = projected[0][:, extra:].unflatten(-1, (2, 12)).mean(2)
    torch.testing.assert_close(seen["keys_BND"], by_token(keys_BTD, side), rtol=1e-4, atol=1e-6)


def by_token(patches_BPD, side):
    """The mean over the patches of each of side x side tokens."""
    images, _, width = patches_BPD.shape
    return patches_BPD.reshape(images, side, 6 // side, side, 6 // side, width).mean((2, 4)).flatten(1, 2)


@pytest.mark.parametrize("kind", first([kind for kind in ONE_SIZE if kind != "paligemma"]))
def test_an_image_is_encoded_whole_even_if_the_model_would_cut_it(kind, hosts):
    """The folder's own processor makes tiles of the same image."""
    _, folder = hosts(kind)
    whole = Encoder.load(str(folder), "merged").preprocess(pictures((300, 90)))
    assert whole.shape == (1, 3, 84, 84)
    tiles = encoder_module.load_image_processor(str(folder), None)(pictures((300, 90)), return_tensors="pt")
    assert tiles["pixel_values"].numel() > whole.numel()


@pytest.mark.parametrize("kind", first([*ONE_SIZE, *RAGGED]))
def test_no_language_model_is_read_or_held(kind, hosts, tmp_path):
    model, folder = hosts(kind)
    text, vision = ("language_model", "text_model", "lm_head"), ("vis", "projector", "connector")
    for file in ("config.json", "preprocessor_config.json"):
        (tmp_path / file).write_text((folder / file).read_text())
    weights = load_file(folder / "model.safetensors")
    kept = {key: weight for key, weight in weights.items() if any(name in key for name in vision)}
    assert 0 < len(kept) < len(weights)
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    encoder = Encoder.load(str(tmp_path), "merged")
    assert not any(name in key for key in encoder.state_dict() for name in text)
    assert sum(weight.numel() for weight in encoder.parameters()) == sum(
        weight.numel() for weight in kept.values()
    )
    assert not any(weight.requires_grad for weight in encoder.parameters())
    assert fingerprint(encoder.tower) == fingerprint(vision_tower(model))


def copied(folder, target, **changes):
    """A copy of a folder in which the image processor has other settings."""
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    settings = json.loads((target / "preprocessor_config.json").read_text())
    (target / "preprocessor_config.json").write_text(json.dumps(settings | changes))
    return target


def test_missing_weights_of_the_merger_are_named(hosts, tmp_path):
    folder = copied(hosts("qwen2_5_vl")[1], tmp_path / "host")
    weights = load_file(folder / "model.safetensors")
    key = next(key for key in weights if "merger.mlp.0.weight" in key)
    del weights[key]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights .*, first visual\.merger\.mlp\.0\.weight"):
        Encoder.load(str(folder), "merged")


@pytest.mark.parametrize(
    ("kind", "changes", "arguments", "pattern"),
    [
        ("qwen3_vl", {"patch_size": 16}, {}, "its image processor has patch_size 16, allowed: 14"),
        ("qwen3_vl", {"merge_size": 1}, {}, "its image processor has merge_size 1, allowed: 2"),
        ("gemma4", {"pooling_kernel_size": 3}, {}, "has pooling_kernel_size 3, allowed: 2"),
        ("gemma3", {"size": {"height": 56, "width": 56}}, {}, "gives 56 x 56 pixels, allowed: 84 x 84"),
        ("qwen3_vl", {}, {"layer": 4}, "there is no layer 4, allowed: 1 to 3, or -3 to -1"),
        ("qwen3_vl", {}, {"layer": 0}, "there is no layer 0, allowed"),
        ("qwen3_vl", {}, {"layer": "last"}, "layer: 'last' is not allowed, allowed: int, 'merged'"),
        ("qwen3_vl", {}, {"size": 56}, "size: 56 is not allowed, allowed: that of its image processor"),
        (
            "qwen3_vl",
            {"image_processor_type": "Lfm2VlImageProcessorFast"},
            {},
            "host: no readable image processor: Lfm2VlImageProcessor requires the Torchvision library but",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_weights_are_read(
    kind, changes, arguments, pattern, hosts, tmp_path
):
    folder = copied(hosts(kind)[1], tmp_path / "host", **changes)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=pattern) as refusal:
        Encoder.load(str(folder), **({"layer": "merged"} | arguments))
    assert "\n" not in str(refusal.value)


def test_what_needs_single_patches_of_one_grid_is_refused(hosts):
    ragged = Encoder.load(str(hosts("qwen2_5_vl")[1]), "merged", "tiny")
    with pytest.raises(ValueError, match="tiny: has no one grid, as its images have grids of their own"):
        ragged.grid  # noqa: B018
    with pytest.raises(ValueError, match="tiny: attention_BN is not available, allowed: an encoder of one"):
        ragged.observe(torch.zeros(1, 3, 84, 84), {"keys_BND", "attention_BN"})
    fixed = Encoder.load(str(hosts("internvl")[1]), "merged", "tiny")
    with pytest.raises(ValueError, match="tiny: has no states of single patches"):
        fixed.states(torch.zeros(1, 3, 84, 84))


@pytest.mark.parametrize("kind", first(RAGGED))
@torch.inference_mode()
def test_many_images_are_encoded_in_passes_of_limited_size(kind, hosts, monkeypatch):
    encoder = Encoder.load(str(hosts(kind)[1]), "merged")
    inputs = encoder.preprocess(pictures(*[(28 * n, 60) for n in range(1, 7)]))
    whole = encoder.images(inputs)
    passes = []
    encoder.reader.register_forward_hook(lambda module, args, output: passes.append(len(output)))
    limit = 600 if kind == "gemma4" else 64
    monkeypatch.setattr(encoder_module, "PATCHES_PER_PASS", limit)
    parts = encoder.images(inputs)
    assert sum(passes) == 6 and 1 < len(passes) <= 6
    same([part for part, _ in parts], [image for image, _ in whole], 1e-5)
    assert [grid for _, grid in parts] == [grid for _, grid in whole]


def test_a_pass_holds_as_many_patches_as_allowed_and_at_least_an_image():
    grids = torch.tensor([[1, 2, 2], [1, 4, 4], [1, 2, 2], [1, 2, 4], [1, 2, 2]])
    pixels = torch.arange(4 + 16 + 4 + 8 + 4)[:, None]
    parts = list(in_passes({"pixel_values": pixels, "image_grid_thw": grids}, 14, 12))
    assert [part["image_grid_thw"].prod(1).tolist() for part in parts] == [[4], [16], [4, 8], [4]]
    assert torch.equal(torch.cat([part["pixel_values"] for part in parts]), pixels)
    assert all(len(part["pixel_values"]) == part["image_grid_thw"].prod(1).sum() for part in parts)
    tiles = in_passes({"pixel_values": torch.zeros(5, 3, 28, 28)}, 14, 8)
    assert [len(part["pixel_values"]) for part in tiles] == [2, 2, 1]


@pytest.fixture(scope="module", params=["tower", "whole"])
def naflex(request, tmp_path_factory):
    """A tiny SigLIP 2 NaFlex tower, and its folder: alone, or with the text model."""
    folder = tmp_path_factory.mktemp("naflex")
    torch.manual_seed(0)
    vision = Siglip2VisionConfig(**NAFLEX)
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    if request.param == "tower":
        model = tower = Siglip2VisionModel(vision)
    else:
        model = Siglip2Model(Siglip2Config(vision_config=NAFLEX, text_config=text | {"vocab_size": 8}))
        tower = model.vision_model
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, 0.08)
    model.eval().save_pretrained(folder)
    Siglip2ImageProcessorPil(patch_size=14, max_num_patches=24).save_pretrained(folder)
    return tower, folder


@pytest.mark.parametrize("layer", [-2, -1, 1])
@torch.inference_mode()
def test_naflex_features_are_the_hidden_states_of_transformers(layer, naflex):
    tower, folder = naflex
    encoder = Encoder.load(str(folder), layer)
    inputs = Siglip2ImageProcessorPil.from_pretrained(folder)(pictures(), return_tensors="pt")
    states = tower(**inputs, output_hidden_states=True).hidden_states[layer]
    seen = encoder.images(encoder.preprocess(pictures()))
    assert encoder.is_ragged and encoder.width == 24 and len({grid for _, grid in seen}) == 3
    for number, (features_ND, (rows, columns)) in enumerate(seen):
        assert [rows, columns] == inputs["spatial_shapes"][number].tolist()
        assert len(features_ND) == rows * columns
        assert torch.equal(features_ND, states[number, : rows * columns])
    for image, (together, _) in zip(pictures(), seen, strict=True):
        ((alone, _),) = encoder.images(encoder.preprocess([image]))
        torch.testing.assert_close(alone, together, rtol=0, atol=1e-5)


def test_naflex_has_no_merged_tokens_and_reads_patches_of_its_own_size(naflex, tmp_path):
    _, folder = naflex
    with pytest.raises(ValueError, match=r"siglip2\w* has no merged tokens, allowed: an int, or a model of"):
        Encoder.load(str(folder), "merged")
    other = copied(folder, tmp_path / "host", patch_size=16)
    with pytest.raises(ValueError, match="its image processor has patch_size 16, allowed: 14"):
        Encoder.load(str(other))


def test_towers_of_hosts_are_told_apart(hosts):
    seen = {
        kind: fingerprint(Encoder.load(str(hosts(kind)[1]), "merged").tower)
        for kind in RAGGED
        if kind in FAST
    }
    for kind, one in seen.items():
        assert is_same_tower(one, fingerprint(vision_tower(hosts(kind)[0])))
    torch.manual_seed(1)
    other = Siglip2VisionModel(Siglip2VisionConfig(**NAFLEX))
    torch.manual_seed(2)
    assert not is_same_tower(fingerprint(other), fingerprint(Siglip2VisionModel(other.config)))
