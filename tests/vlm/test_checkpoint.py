import json
import re
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from atr.features.encoder import Encoder
from atr.vlm.checkpoint import load_vlm, version_of, weight_dtype


@pytest.fixture
def folder(make_model, processor, tmp_path):
    make_model(dtype=torch.bfloat16).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_model_is_loaded_frozen_with_the_given_dtype(folder, make_model, dtype):
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
def test_weights_have_the_lower_dtype_of_a_precision(precision, dtype):
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


def test_missing_weights_are_refused(folder):
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
def test_an_image_processor_of_torchvision_is_replaced_with_a_message(folder, processor, hub, capsys):
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


def test_other_model_types_are_refused_by_name(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "blip-2"}))
    with pytest.raises(ValueError, match="'blip-2' is not supported, allowed: llava"):
        load_vlm(str(folder), torch.float32)


def test_a_processor_without_chat_template_is_refused(folder, processor):
    shutil.rmtree(folder / "chat_template.jinja", ignore_errors=True)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(ValueError, match="no chat template"):
        load_vlm(str(folder), torch.float32)


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
def test_a_processor_with_another_token_count_is_refused(model, processor, tmp_path, field, value, needed):
    message = refused_with(tmp_path, model, processor, **{field: value})
    assert re.match(
        rf"{tmp_path}: the processor makes \d+ placeholders of an image of which the model reads", message
    )
    assert message.endswith(f" tokens: {field} is {value!r}, needed: {needed!r}")


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
def test_a_processor_with_other_pinpoints_is_refused(model, processor, tmp_path):
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
def test_a_strategy_that_reads_other_tokens_than_the_patches_is_refused(
    make_model, processor, tmp_path, strategy, leading
):
    model = make_model(vision_feature_select_strategy=strategy)
    message = refused_with(tmp_path, model, processor, vision_feature_select_strategy=strategy)
    assert (
        f"vision_feature_select_strategy: {strategy!r} cannot serve a tower with {leading} tokens" in message
    )
