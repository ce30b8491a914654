import subprocess
import sys
from importlib import invalidate_caches

import pytest
import torch
from transformers.image_processing_utils import select_best_resolution

from atr.vlm.encoded_tiles import EncodedTiles
from atr.vlm.families import family_named, family_of, supported_types
from atr.vlm.families.tower import encode_tiles
from atr.vlm.tiling import TileLayout

FAMILIES = pytest.mark.parametrize("family", ["llava", "llava_next", "llava_onevision"])
TILED = pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
PROMPTS = ("<image> a", "b", "<image> <image>", "<image> c")


@FAMILIES
@pytest.mark.parametrize("layer", [-2, 1, -1, [1, -2]])
@torch.no_grad()
def test_features_are_encoded_and_packed_as_the_model_itself_does(make_model, process, layer):
    model, inputs = make_model(vision_feature_layer=layer), process(*PROMPTS)
    images = {key: inputs[key] for key in inputs if key not in ("input_ids", "attention_mask")}
    own = model.model.get_image_features(**images).pooler_output
    tiling = family_of(model).tiling(model, inputs)
    encoded = encode_tiles(model, inputs, tiling)
    assert encoded.grid == (4, 4)
    assert encoded.features_BND.shape == (sum(tiling.tiles), 16, 24 * (2 if isinstance(layer, list) else 1))
    assert len(own) == 4
    packed = TileLayout(model, tiling).tokens(EncodedTiles.of_one_grid(encoded)).images
    assert all(map(torch.equal, packed, own))


@pytest.mark.parametrize("family", ["llava_onevision"])
@torch.no_grad()
def test_unresampled_is_the_model_whose_limit_no_image_reaches(make_model, process):
    model, other = make_model(), make_model(vision_aspect_ratio="anyres_max_1000")
    inputs = process(*PROMPTS)
    images = {key: inputs[key] for key in inputs if key not in ("input_ids", "attention_mask")}
    tiling = family_of(model).tiling(model, inputs)
    encoded = EncodedTiles.of_one_grid(encode_tiles(model, inputs, tiling))
    packed = TileLayout(model, tiling, resample=False).tokens(encoded).images
    assert all(map(torch.equal, packed, other.model.get_image_features(**images).pooler_output))
    shrunk = [len(features) for features in model.model.get_image_features(**images).pooler_output]
    assert any(len(tokens) > length for tokens, length in zip(packed, shrunk, strict=True))


@pytest.mark.parametrize("family", ["llava_onevision"])
def test_of_several_images_in_a_sample_each_is_one_tile(model, process):
    tiles = family_of(model).tiling(model, process(*PROMPTS)).tiles
    assert tiles[1:3] == (1, 1)
    assert tiles[0] > 1 and tiles[3] > 1


@TILED
def test_tiles_are_arranged_as_the_resolution_that_fits_best(model, process):
    inputs = process(*PROMPTS)
    tiling = family_of(model).tiling(model, inputs)
    cut = [tiles > 1 for tiles in tiling.tiles]
    for size, arrangement, tiles in zip(
        inputs["image_sizes"].tolist(), tiling.arrangements, tiling.tiles, strict=True
    ):
        height, width = select_best_resolution(size, model.config.image_grid_pinpoints)
        assert arrangement == ((height // 28, width // 28) if tiles > 1 else (0, 0))
        assert arrangement[0] * arrangement[1] == tiles - 1
    assert any(cut) and len(set(tiling.arrangements)) > 1


@TILED
def test_stacked_tiles_are_read_as_the_model_reads_them(model, process):
    inputs = process("<image> a", "<image> c")
    tiling = family_of(model).tiling(model, inputs)
    stacked = torch.cat(
        [pixels[:tiles] for pixels, tiles in zip(inputs["pixel_values"], tiling.tiles, strict=True)]
    )
    other = {**inputs, "pixel_values": stacked}
    assert family_of(model).tiling(model, other) == tiling
    assert torch.equal(
        encode_tiles(model, other, tiling).features_BND, encode_tiles(model, inputs, tiling).features_BND
    )


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_a_tower_whose_class_token_is_read_does_not_fit_the_grid(model, process):
    model.config.vision_feature_select_strategy = "full"
    inputs = process("<image>")
    with pytest.raises(ValueError, match="17 tokens"):
        encode_tiles(model, inputs, family_of(model).tiling(model, inputs))


@TILED
def test_pixels_that_the_model_would_cut_otherwise_are_refused(model, process):
    inputs, family = process(*PROMPTS), family_of(model)
    with pytest.raises(ValueError, match="image_sizes is missing"):
        family.tiling(model, {key: value for key, value in inputs.items() if key != "image_sizes"})
    with pytest.raises(ValueError, match=r"tiles of \(28, 21\) pixels, the model reads 28"):
        family.tiling(model, {**inputs, "pixel_values": inputs["pixel_values"][..., :21]})
    with pytest.raises(ValueError, match=r"pixel_values: \[1, 1, 1, 1\] tiles, image_sizes .* need \["):
        family.tiling(model, {**inputs, "pixel_values": inputs["pixel_values"][:, :1]})
    with pytest.raises(ValueError, match=r"need \["):
        family.tiling(model, {**inputs, "pixel_values": inputs["pixel_values"][:-1]})


@pytest.mark.parametrize("family", ["llava_onevision"])
def test_counts_of_images_that_contradict_each_other_are_refused(model, process):
    inputs = process(*PROMPTS)
    with pytest.raises(ValueError, match="batch_num_images: 3 images, image_sizes has 4"):
        family_of(model).tiling(model, {**inputs, "batch_num_images": torch.tensor([1, 2])})


def test_an_unsupported_model_type_is_refused_by_name(model):
    model.config.model_type = "kosmos"
    with pytest.raises(ValueError, match="'kosmos' is not supported, allowed: llava, llava_next, "):
        family_of(model)


@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_onevision"])
@torch.no_grad()
def test_attention_and_keys_are_those_of_the_layer_that_is_read(model, process):
    inputs = process("<image> a", "b <image> c <image>")
    tiling = family_of(model).tiling(model, inputs)
    encoded = encode_tiles(model, inputs, tiling, {"attention_BN", "keys_BND"})
    tower = model.model.vision_tower
    tower.set_attn_implementation("eager")
    tiles = sum(tiling.tiles)
    pixels = encode_tiles(model, inputs, tiling, {"pixels_BCHW"}).pixels_BCHW
    seen = tower(pixels, output_attentions=True)
    weights = seen.attentions[model.config.vision_feature_layer]
    has_class = tower.config.model_type == "clip_vision_model"
    expected = weights[:, :, :1] if has_class else weights
    expected = expected.mean((1, 2))[:, 1 if has_class else 0 :]
    torch.testing.assert_close(encoded.attention_BN, expected)
    assert encoded.keys_BND.shape[:2] == (tiles, encoded.tokens)
    assert encode_tiles(model, inputs, tiling).attention_BN is None


@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_onevision"])
@pytest.mark.parametrize("layers", [[1, -2], [-2, 1], [-1, 2, -3]])
@torch.no_grad()
def test_of_several_layers_the_last_that_is_named_gives_attention_and_keys(make_model, process, layers):
    model, inputs = make_model(vision_feature_layer=layers), process("<image> a", "b <image> c <image>")
    tiling = family_of(model).tiling(model, inputs)
    needs = {"attention_BN", "keys_BND", "first_attention_BN", "pixels_BCHW"}
    encoded = encode_tiles(model, inputs, tiling, needs)
    tower, depth = model.model.vision_tower, 3
    tower.set_attn_implementation("eager")
    seen = tower(encoded.pixels_BCHW, output_attentions=True, output_hidden_states=True)
    # `hidden_states` begins with the embeddings, attentions and layers with what comes out of the first one.
    number = range(depth + 1)[layers[-1]] - 1
    class_tokens = int(tower.config.model_type == "clip_vision_model")
    queries = slice(0, 1) if class_tokens else slice(None)
    for found_BN, weights_BHTT in (
        (encoded.attention_BN, seen.attentions[number]),
        (encoded.first_attention_BN, seen.attentions[0]),
    ):
        torch.testing.assert_close(found_BN, weights_BHTT[:, :, queries].mean((1, 2))[:, class_tokens:])
    others = [seen.attentions[other][:, :, queries].mean((1, 2)) for other in range(depth) if other != number]
    assert not any(torch.allclose(encoded.attention_BN, other[:, class_tokens:]) for other in others)
    layer = tower.encoder.layers[number]
    keys_BTD = layer.self_attn.k_proj(layer.layer_norm1(seen.hidden_states[number]))
    heads = tower.config.num_attention_heads
    torch.testing.assert_close(
        encoded.keys_BND, torch.stack(keys_BTD.chunk(heads, dim=-1)).mean(0)[:, class_tokens:]
    )


@pytest.mark.parametrize("family", ["llava"])
@torch.no_grad()
def test_attention_of_an_untrained_class_token_tells_nothing_and_is_not_taken(model, process):
    tower, inputs = model.model.vision_tower, process("<image> a")
    tower.config.untrained_class_token = True
    encoded = encode_tiles(model, inputs, family_of(model).tiling(model, inputs), {"attention_BN"})
    tower.set_attn_implementation("eager")
    weights = tower(inputs["pixel_values"], output_attentions=True).attentions[
        model.config.vision_feature_layer
    ]
    torch.testing.assert_close(encoded.attention_BN, weights.mean(1)[:, 1:, 1:].mean(1))


@pytest.mark.parametrize("family", ["llava"])
def test_attention_of_an_unknown_tower_is_refused_by_name(model, process):
    inputs = process("<image> a")
    model.model.vision_tower.config.model_type = "other"
    with pytest.raises(ValueError, match="attention_BN is not available from a tower of type other"):
        encode_tiles(model, inputs, family_of(model).tiling(model, inputs), {"attention_BN"})


MODULE = """
from atr.vlm.families.tower import TowerFamily


class Tiny(TowerFamily):
    def image_keys(self, model):
        return frozenset({"pixel_values"})

    def tiling(self, model, inputs):
        return None

    def pack(self, model, tiling, values, newline_C, resample):
        return list(values)


class Unpacked(TowerFamily):
    image_keys = Tiny.image_keys
    tiling = Tiny.tiling


class Keyless(TowerFamily):
    tiling, pack = Tiny.tiling, Tiny.pack


FAMILY, UNPACKED, KEYLESS = Tiny(), Unpacked(), Keyless()
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Installs packages of the users: entry points of the group atr.families, by name."""
    (tmp_path / "tiny_families.py").write_text(MODULE)
    (tmp_path / "broken_families.py").write_text("raise RuntimeError('no such\\nlibrary')")
    monkeypatch.syspath_prepend(tmp_path)
    family_named.cache_clear()

    def install(package, **families):
        folder = tmp_path / f"{package}-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        lines = [f"{name} = {value}" for name, value in families.items()]
        (folder / "entry_points.txt").write_text("\n".join(["[atr.families]", *lines]))
        invalidate_caches()

    yield install
    family_named.cache_clear()


def test_a_users_family_is_found_by_its_entry_point(install, model):
    install("tiny", tiny="tiny_families:FAMILY")
    model.config.model_type = "tiny"
    assert type(family_of(model)).__name__ == "Tiny"
    assert supported_types()[0] == "llava" and supported_types()[-1] == "tiny"
    with pytest.raises(ValueError, match=r"'other' is not supported, allowed: llava, .*, tiny$"):
        family_named("other")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            "no_such_module:FAMILY",
            "cannot be imported: ModuleNotFoundError: .* 'no_such_module'",
        ),
        ("tiny_families:NOTHING", "cannot be imported: AttributeError: .* no attribute 'NOTHING'"),
        ("broken_families:FAMILY", "cannot be imported: RuntimeError: no such library"),
        ("tiny_families:Tiny", "is a class, allowed: an object"),
        ("tiny_families:UNPACKED", "lacks the method pack"),
        ("tiny_families:KEYLESS", "lacks the method image_keys"),
    ],
)
def test_a_broken_entry_point_is_refused_in_one_line(install, value, message):
    install("tiny", tiny=value)
    expected = rf"^entry point tiny of atr.families \({value}\) {message}$"
    with pytest.raises(ValueError, match=expected) as error:
        family_named("tiny")
    assert "\n" not in str(error.value)


def test_two_families_of_one_name_are_refused(install):
    install("tiny", tiny="tiny_families:FAMILY", llava="tiny_families:FAMILY")
    install("other", tiny="tiny_families:FAMILY")
    with pytest.raises(ValueError, match=r"^entry point tiny .* has the name of entry point tiny"):
        family_named("tiny")
    with pytest.raises(
        ValueError, match=r"^entry point llava .* has the name of a built-in family, allowed: a name"
    ):
        family_named("llava")
    assert family_named("llava_next")


def test_a_family_is_imported_when_it_is_asked_for():
    code = (
        "import sys; from atr.vlm.families import supported_types, family_named; supported_types();"
        "mine = lambda: {name.rpartition('.')[2] for name in sys.modules if '.families.llava' in name};"
        "print(mine()); family_named('llava'); print(mine())"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.splitlines() == ["set()", "{'llava'}"]
