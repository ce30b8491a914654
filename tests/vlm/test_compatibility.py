import json

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, SiglipImageProcessorPil, SiglipVisionModel

from atr import config
from atr.core.fingerprint import fingerprint
from atr.core.hub import split_revision
from atr.features.encoder import Encoder, load_image_processor
from atr.features.preprocess import describe_preprocessing
from atr.features.wheel_weights import WHEELS
from atr.reduction import FeatureSelector
from atr.vlm.compatibility import check_features, check_selector, cuts_images, other_images
from atr.vlm.families import family_of
from atr.vlm.families.tower import encode_tiles
from atr.vlm.reduce import reduce


@pytest.mark.parametrize("layer", [-2, 2])
def test_features_of_the_layer_the_model_reads_fit(model, layer):
    check_features(model, {"layer": layer, "grid": [4, 4], "width": 24})


@pytest.mark.parametrize("change", [{"layer": -1}, {"layer": 1}, {"grid": [2, 8]}, {"width": 25}])
def test_other_features_do_not_fit(model, change):
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
def test_a_selector_of_other_features_does_not_fit(model, family, change):
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
    manifest = {"layer": -2, "grid": [4, 4], "width": 24, "encoder": "my/tower"}
    manifest["fingerprint"] = fingerprint(model.model.vision_tower)
    check_features(model, manifest)
    torch.nn.init.normal_(model.model.vision_tower.get_input_embeddings().weight)
    with pytest.raises(ValueError, match="are of encoder my/tower, whose weights are not those"):
        check_features(model, manifest)


def test_of_several_layers_a_selector_of_one_is_refused(make_model):
    model = make_model(vision_feature_layer=[1, -2])
    check_selector(model, selector(width=48))
    with pytest.raises(ValueError, match=r"reads layer \[1, -2\], \[4, 4, 48\]"):
        check_selector(model, selector(width=48, layer=-2))


@pytest.mark.parametrize("family", ["llava_onevision"])
@torch.no_grad()
def test_a_selector_of_the_whole_siglip_reads_what_onevision_does(model, processor, tmp_path):
    """Its tower lacks SigLIP's last layer, so that the same layer has another index from the end."""
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
    whole = encode_tiles(model, inputs, family_of(model).tiling(model, inputs)).features_BND[:1]
    torch.testing.assert_close(encoder(encoder.preprocess([image])), whole)
    check_selector(model, selector(layer=encoder.layer))
    # 26 of SigLIP's 27 layers, as OneVision's published configuration has it.
    assert config.ENCODERS["siglip-so400m-patch14-384"].layer == 26


@pytest.mark.parametrize("family, cuts", [("llava", False), ("llava_next", True), ("llava_onevision", True)])
def test_families_that_cut_images(model, cuts):
    assert cuts_images(model) == cuts


@pytest.mark.parametrize("name", [vlm.name for vlm in config.VLMS.values() if vlm.stored])
def test_the_shipped_models_take_the_features_of_their_encoder(name, tmp_path):
    vlm = config.VLMS[name]
    preset, path = config.ENCODERS[vlm.encoder], config.ENCODERS[vlm.encoder].path
    if (wheel := WHEELS.get(split_revision(path)[0])) is not None:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(dict(wheel.processor)))
        path = str(tmp_path)
    encoder, processor = load_image_processor(path, preset.size), AutoProcessor.from_pretrained(vlm.path)
    assert other_images(processor, {"preprocess": describe_preprocessing(encoder)}) == ""
