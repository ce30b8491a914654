import json
import re
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, SiglipImageProcessorPil, SiglipVisionModel

from atr import config
from atr.core.fingerprint import fingerprint
from atr.core.hub import split_revision
from atr.features.encoder import Encoder, load_image_processor
from atr.features.preprocess import describe_preprocessing
from atr.features.wheel_weights import WHEELS
from atr.reduction import FeatureSelector
from atr.vlm.checkpoint import load_vlm, version_of, weight_dtype
from atr.vlm.compatibility import check_features, check_selector, cuts_images, other_images
from atr.vlm.families import encode, family_of
from atr.vlm.reduce import reduce


@pytest.fixture
def folder(make_model, processor, tmp_path):
    make_model(dtype=torch.bfloat16).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_model_comes_back_frozen_in_the_asked_type(folder, make_model, dtype):
    model, processor = load_vlm(str(folder), dtype)
    saved = make_model(dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(value, saved[name].to(dtype)) for name, value in model.state_dict().items())
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert processor.image_token == "<image>"


@pytest.fixture
def on_the_hub(folder, hub, tmp_path_factory, monkeypatch):
    """The model as org/tiny in a cache of the hub's: at `old`, and with other weights at `main`."""
    home, main = (tmp_path_factory.mktemp(name) for name in ("cache", "main"))
    shutil.copytree(folder, main, dirs_exist_ok=True)
    weights = load_file(folder / "model.safetensors")
    save_file(
        {name: weight + 1 for name, weight in weights.items()}, main / "model.safetensors", {"format": "pt"}
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home))
    return hub.cache(home, "org/tiny", {"old": folder, "main": main})


def test_a_revision_of_the_hub_is_the_one_that_is_loaded_and_recorded(on_the_hub, folder):
    saved, _ = load_vlm(str(folder), torch.float32)
    old, _ = load_vlm("org/tiny@old", torch.float32)
    main, processor = load_vlm("org/tiny", torch.float32)
    for name, weight in saved.state_dict().items():
        assert torch.equal(old.state_dict()[name], weight)
        assert torch.equal(main.state_dict()[name], (weight.bfloat16() + 1).float())
    assert processor.image_token == "<image>"
    assert version_of("org/tiny@old", old)["commit"] == on_the_hub["old"]
    assert version_of("org/tiny", main)["commit"] == on_the_hub["main"]
    with pytest.raises(ValueError, match=r"^org/tiny@new: no model could be loaded from it"):
        load_vlm("org/tiny@new", torch.float32)


@pytest.mark.parametrize("family", ["llava"])
def test_an_encoder_at_a_revision(on_the_hub, folder):
    towers = [Encoder.load(path).tower.state_dict() for path in (str(folder), "org/tiny@old", "org/tiny")]
    for name, weight in towers[0].items():
        assert torch.equal(towers[1][name], weight) and not torch.equal(towers[2][name], weight)


@pytest.mark.parametrize(
    "precision, dtype",
    [
        ("bf16-mixed", torch.bfloat16),
        ("16-true", torch.float16),
        (32, torch.float32),
        ("64-true", torch.float64),
    ],
)
def test_weights_take_the_lower_type_of_a_precision(precision, dtype):
    assert weight_dtype(precision) == dtype


def test_weights_that_are_cut_off_are_refused(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=f"{folder}: no model could be loaded from it"):
        load_vlm(str(folder), torch.float32)


def test_weights_of_another_shape_are_refused(folder):
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("linear_1.weight"))
    save_file(weights | {name: torch.zeros(32, 23)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"{folder}: no model could be loaded from it"):
        load_vlm(str(folder), torch.float32)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("part", ["linear_1.weight", "lm_head.weight", "layers.0.mlp.fc1.bias"])
def test_weights_that_are_not_finite_are_refused_by_name(folder, part, value):
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith(part))
    weights[name].flatten()[2:4] = value
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"^{folder}: 1 of \d+ tensors hold NaN .*{part} \(2 of its"):
        load_vlm(str(folder), torch.float32)


def test_missing_weights_are_refused_and_not_made_up(folder):
    weights = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in weights.items() if "linear_1" not in name}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"the weights lack .*linear_1.bias and 1 more"):
        load_vlm(str(folder), torch.float32)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_folder_without_one_of_its_files_is_refused(folder, file):
    (folder / file).unlink()
    with pytest.raises(ValueError, match=f"{folder}.*{file}"):
        load_vlm(str(folder), torch.float32)


FAMILIES = ("llava", "llava_next", "llava_onevision")


def in_the_layout_of_the_hub(folder):
    """Take the image processor out of processor_config.json into a file of its own; returns its path."""
    whole = json.loads((folder / "processor_config.json").read_text())
    images = whole.pop("image_processor")
    (folder / "processor_config.json").write_text(json.dumps(whole))
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    return folder / "preprocessor_config.json"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("file", ["processor_config.json", "preprocessor_config.json", "tokenizer.json"])
def test_a_folder_without_a_file_of_its_processor_is_refused(folder, file):
    in_the_layout_of_the_hub(folder)
    (folder / file).unlink()
    with pytest.raises(ValueError, match=f"{folder}: no readable processor: .") as raised:
        load_vlm(str(folder), torch.float32)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_unknown_image_processor_is_refused(folder):
    file = in_the_layout_of_the_hub(folder)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"image_processor_type": "NoImageProcessor"}))
    with pytest.raises(ValueError, match=f"{folder}: no readable processor: .*"):
        load_vlm(str(folder), torch.float32)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("hub", [False, True])
def test_an_image_processor_of_torchvision_is_replaced_and_that_is_said(folder, processor, hub, capsys):
    load_vlm(str(folder), torch.float32)
    assert "torchvision" not in capsys.readouterr().err
    file = in_the_layout_of_the_hub(folder) if hub else folder / "processor_config.json"
    used = type(processor.image_processor).__name__
    asked = used.replace("Pil", "Fast")
    file.write_text(file.read_text().replace(used.removesuffix("Pil"), asked))
    assert asked in file.read_text()
    loaded = load_vlm(str(folder), torch.float32)[1].image_processor
    assert type(loaded) is type(processor.image_processor)
    assert f"{folder}: {asked} needs torchvision, using {used} instead" in capsys.readouterr().err


def test_a_folder_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="data/nowhere/llava: no model could be loaded from it"):
        load_vlm("data/nowhere/llava", torch.float32)


def test_other_families_are_refused_by_name(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "blip-2"}))
    with pytest.raises(ValueError, match="'blip-2' is not supported, allowed: llava"):
        load_vlm(str(folder), torch.float32)


def test_a_processor_that_cannot_ask_is_refused(folder, processor):
    shutil.rmtree(folder / "chat_template.jinja", ignore_errors=True)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(ValueError, match="no chat template"):
        load_vlm(str(folder), torch.float32)


@pytest.mark.parametrize("layer", [-2, 2])
def test_features_of_the_layer_the_model_reads_fit(model, layer):
    check_features(model, {"layer": layer, "grid": [4, 4], "width": 24})


@pytest.mark.parametrize("change", [{"layer": -1}, {"layer": 1}, {"grid": [2, 8]}, {"width": 25}])
def test_other_features_do_not(model, change):
    with pytest.raises(ValueError, match=r"the stored features are .*, the model reads"):
        check_features(model, {"layer": -2, "grid": [4, 4], "width": 24} | change)


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
def test_a_model_that_cuts_images_into_tiles_reads_no_stored_features(model, family):
    with pytest.raises(ValueError, match=f"{family} cuts images into tiles"):
        check_features(model, {"layer": -2, "grid": [4, 4], "width": 24})


def selector(**change):
    return FeatureSelector(**{"width": 24, "grid": (4, 4), "layers": 1, "heads": 2} | change)


@pytest.mark.parametrize(
    "family, layers", [("llava", (-2, 2)), ("llava_next", (-2, 2)), ("llava_onevision", (-1, 3))]
)
def test_a_selector_of_the_features_the_model_reads_fits(model, layers):
    for layer in (*layers, None):
        check_selector(model, selector(layer=layer))


@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_onevision"])
@pytest.mark.parametrize("change", [{"layer": 1}, {"layer": 0}, {"grid": (2, 8)}, {"width": 48}])
def test_a_selector_of_other_features_does_not(model, family, change):
    model.name_or_path = "some/model"
    with pytest.raises(ValueError, match=r"of encoder my/tower, .*; some/model reads layer"):
        check_selector(model, selector(**{"encoder": "my/tower", "layer": None} | change))


@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_onevision"])
def test_a_selector_of_another_tower_of_the_same_shape_is_refused(model, family):
    model.name_or_path = "some/model"
    fitting = selector(encoder="my/tower")
    fitting.note(fingerprint=fingerprint(model.model.vision_tower))
    check_selector(model, fitting)
    check_selector(model.bfloat16(), fitting)
    torch.nn.init.normal_(model.model.vision_tower.get_input_embeddings().weight)
    message = (
        "trained on encoder my/tower, whose weights are not those of the vision tower that some/model has"
    )
    with pytest.raises(ValueError, match=message):
        check_selector(model, fitting)
    with pytest.raises(ValueError, match=message):
        reduce(model, {}, fitting, 0.5)


def test_stored_features_of_another_tower_of_the_same_shape_are_refused(model):
    about = {"layer": -2, "grid": [4, 4], "width": 24, "encoder": "my/tower"}
    about["fingerprint"] = fingerprint(model.model.vision_tower)
    check_features(model, about)
    torch.nn.init.normal_(model.model.vision_tower.get_input_embeddings().weight)
    with pytest.raises(ValueError, match="are of encoder my/tower, whose weights are not those"):
        check_features(model, about)


def test_of_several_layers_a_selector_of_one_is_refused(make_model):
    model = make_model(vision_feature_layer=[1, -2])
    check_selector(model, selector(width=48))
    with pytest.raises(ValueError, match=r"reads layer \[1, -2\], \[4, 4, 48\]"):
        check_selector(model, selector(width=48, layer=-2))


@pytest.mark.parametrize("family", ["llava_onevision"])
@torch.no_grad()
def test_a_selector_of_the_whole_siglip_reads_what_onevision_does(model, processor, tmp_path):
    """Its tower lacks SigLIP's last layer: by an index from the end the same layer has two numbers."""
    vision = model.config.vision_config
    deeper = type(vision).from_dict(vision.to_dict() | {"num_hidden_layers": vision.num_hidden_layers + 1})
    tower = SiglipVisionModel(deeper)
    missing, unexpected = tower.load_state_dict(model.model.vision_tower.state_dict(), strict=False)
    assert unexpected == [] and all(".layers.3." in name or "head." in name for name in missing)
    tower.save_pretrained(tmp_path)
    SiglipImageProcessorPil(size={"height": 28, "width": 28}).save_pretrained(tmp_path)
    processor.image_processor.image_mean = processor.image_processor.image_std = [0.5] * 3  # as published
    encoder = Encoder.load(str(tmp_path), vision.num_hidden_layers)
    pixels = torch.randint(0, 256, (50, 40, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    image = Image.fromarray(pixels.numpy())
    inputs = processor(text=["<image> a"], images=[[image]], return_tensors="pt")
    whole = encode(model, inputs, family_of(model).tiling(model, inputs)).features_BND[:1]
    torch.testing.assert_close(encoder(encoder.preprocess([image])), whole)
    check_selector(model, selector(layer=encoder.layer))
    # 26 of SigLIP's 27 layers, as OneVision's published configuration has it.
    assert config.ENCODERS["siglip-so400m-patch14-384"].layer == 26


@pytest.mark.parametrize("family, cuts", [("llava", False), ("llava_next", True), ("llava_onevision", True)])
def test_families_that_cut_images(model, cuts):
    assert cuts_images(model) == cuts


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
def test_the_processor_comes_back_as_it_was_without_torchvision(folder, processor):
    _, loaded = load_vlm(str(folder), torch.float32)
    images = [[Image.new("RGB", (60, 84), "red")], [Image.new("RGB", (20, 20))]]
    first, second = (
        each(text=["<image> a", "<image> b"], images=images, padding=True, return_tensors="pt")
        for each in (processor, loaded)
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(torch.as_tensor(first[key]), torch.as_tensor(second[key])) for key in first)


def refused_with(folder, model, processor, **changes):
    for field, value in changes.items():
        setattr(processor, field, value)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "model.safetensors").unlink()  # it must not come to reading it
    with pytest.raises(ValueError, match=r"^[^\n]*$") as raised:
        load_vlm(str(folder), torch.float32)
    return str(raised.value)


@pytest.mark.parametrize(
    ("family", "field", "value", "needed"),
    [
        ("llava", "num_additional_image_tokens", 0, 1),
        ("llava", "num_additional_image_tokens", 2, 1),
        ("llava", "patch_size", 14, 7),
        ("llava", "vision_feature_select_strategy", "full", "default"),
        ("llava_next", "num_additional_image_tokens", 0, 1),
        ("llava_next", "patch_size", 14, 7),
        ("llava_next", "vision_feature_select_strategy", "full", "default"),
        ("llava_onevision", "num_image_tokens", 15, 16),
        ("llava_onevision", "num_image_tokens", 25, 16),
    ],
)
def test_a_processor_that_counts_otherwise_than_its_model_is_refused(
    model, processor, tmp_path, field, value, needed
):
    message = refused_with(tmp_path, model, processor, **{field: value})
    assert re.match(
        rf"{tmp_path}: the processor makes \d+ placeholders of an image of which the model reads", message
    )
    assert message.endswith(f" tokens: {field} is {value!r}, needed: {needed!r}")


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
def test_a_processor_that_cuts_otherwise_than_its_model_is_refused(model, processor, tmp_path):
    processor.image_processor.image_grid_pinpoints = [[28, 28]]
    message = refused_with(tmp_path, model, processor)
    assert "cannot read the images that its processor makes" in message or "image_grid_pinpoints" in message


def test_a_processor_of_other_sizes_than_its_tower_is_refused(model, processor, tmp_path):
    processor.image_processor.crop_size = {"height": 35, "width": 35}
    assert "the model cannot read the images that its processor makes: Input image size" in refused_with(
        tmp_path, model, processor
    )


@pytest.mark.parametrize(
    ("family", "strategy", "leading"), [("llava", "full", 1), ("llava_onevision", "default", 0)]
)
def test_a_strategy_that_feeds_other_tokens_than_the_patches_is_refused(
    make_model, processor, tmp_path, strategy, leading
):
    model = make_model(vision_feature_select_strategy=strategy)
    message = refused_with(tmp_path, model, processor, vision_feature_select_strategy=strategy)
    assert (
        f"vision_feature_select_strategy: {strategy!r} cannot serve a tower with {leading} tokens" in message
    )


@pytest.mark.parametrize("name", [vlm.name for vlm in config.VLMS.values() if vlm.stored])
def test_the_shipped_models_take_the_features_of_their_encoder(name, tmp_path):
    vlm = config.VLMS[name]
    preset, path = config.ENCODERS[vlm.encoder], config.ENCODERS[vlm.encoder].path
    if (wheel := WHEELS.get(split_revision(path)[0])) is not None:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(dict(wheel.processor)))
        path = str(tmp_path)
    encoder, processor = load_image_processor(path, preset.size), AutoProcessor.from_pretrained(vlm.path)
    assert other_images(processor, {"preprocess": describe_preprocessing(encoder)}) == ""
