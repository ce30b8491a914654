import re
from dataclasses import replace
from pathlib import Path

import pytest

from atr import config
from atr.config import presets
from atr.config.presets import ENCODERS, VLMS, EncoderPreset, VlmPreset, find_preset, read_presets

ROOT = Path(__file__).parents[2]
ONE_HEAD = {"pretrain__heads": 1, "distill__heads": 1}
"""A divisor of every encoder's width."""
MERGED = (
    "qwen2.5-vl-3b", "qwen2.5-vl-7b", "qwen3-vl-2b", "qwen3-vl-8b",
    "internvl3-8b", "gemma-3-4b", "smolvlm-500m",
)  # fmt: skip
"""Models whose own tokens are the features."""
BOUNDED = MERGED[:4]
"""Those whose image processor bounds the area of an image."""


@pytest.fixture
def labels(write):
    """Names of the encoder and the model that parameters choose."""

    def labels(**changes):
        return config.load("evaluate", write(**changes)).labels()

    return labels


@pytest.fixture
def two_encoders(monkeypatch):
    """A world with a second encoder and its model, and a third encoder that no model reads."""
    more = {name: EncoderPreset(name=name, path=f"x/{name}") for name in ("siglip", "blind")}
    monkeypatch.setattr(presets, "ENCODERS", ENCODERS | more)
    vlm = VlmPreset(name="onevision", path="x/onevision", encoder="siglip")
    monkeypatch.setattr(presets, "VLMS", VLMS | {"onevision": vlm})


def test_auto_takes_the_model_that_reads_the_encoder(labels, two_encoders):
    assert labels() == {"encoder": "micro", "vlm": "micro"}
    assert labels(encoder="siglip") == {"encoder": "siglip", "vlm": "onevision"}


def test_an_impossible_pair_names_the_models_that_read_the_encoder(write, message, two_encoders):
    assert "allowed: onevision, a folder" in message(write(encoder="siglip", vlm="micro"))
    assert "'micro' does not read encoder 'siglip'" in message(write(encoder="siglip", vlm="micro"))
    assert "'auto' finds no model that reads encoder 'blind'" in message(write(encoder="blind"))
    assert "'micro' does not read" in message(write(encoder="org/tower", vlm="micro"))


@pytest.mark.parametrize(
    "encoder, readers",
    [
        ("dinov2-small", ["micro-dinov2"]),
        ("clip-vit-large-patch14-336", ["llava-next-7b", "llava-1.5-7b"]),
        ("siglip-so400m-patch14-384", ["llava-onevision-7b"]),
        *((name, [name]) for name in MERGED),
    ],
)
def test_encoders_have_their_models(write, message, labels, encoder, readers):
    assert labels(encoder=encoder, **ONE_HEAD)["vlm"] == readers[0]
    for name in readers:
        assert config.load("evaluate", write(encoder=encoder, vlm=name, **ONE_HEAD)).vlm == VLMS[name]
    refused = message(write(encoder=encoder, vlm="micro"))
    assert f"'micro' does not read encoder {encoder!r}, allowed: {', '.join(readers)}, a folder" in refused


def test_auto_refuses_to_choose_among_models_that_none_is_marked_for(write, message, monkeypatch):
    both = {name: VlmPreset(name=name, path=f"x/{name}", encoder="micro") for name in ("one", "two")}
    monkeypatch.setattr(presets, "VLMS", both)
    text = message(write())
    assert text == (
        "vlm: 'auto' finds 2 models that read encoder 'micro', allowed: one, two, a folder, or a hub id "
        "org/name"
    )
    monkeypatch.setattr(presets, "VLMS", {"two": replace(both["two"], auto=True), "one": both["one"]})
    assert config.load("evaluate", write()).vlm.name == "two"


def test_a_model_reads_its_own_encoder_alone(write, message):
    text = message(write(encoder="qwen2.5-vl-3b", vlm="qwen2.5-vl-7b", **ONE_HEAD))
    assert text == (
        "vlm: 'qwen2.5-vl-7b' does not read encoder 'qwen2.5-vl-3b', allowed: qwen2.5-vl-3b, a folder, or a "
        "hub id org/name"
    )


@pytest.mark.parametrize("name", MERGED)
def test_a_model_whose_own_tokens_are_the_features_shares_the_checkpoint_of_its_encoder(name):
    encoder, vlm = ENCODERS[name], VLMS[name]
    assert (encoder.path, encoder.name, encoder.layer) == (vlm.path, vlm.encoder, "merged")
    assert not vlm.stored and encoder.width != encoder.patch_width
    assert (encoder.max_pixels is not None) == (encoder.min_pixels is not None) == (name in BOUNDED)


@pytest.mark.parametrize("name", [name for name in ENCODERS if name not in MERGED])
def test_encoders_that_merge_nothing_have_no_merged_tokens(write, message, name):
    text = message(write(encoder=name, vlm="org/model", extract__layer="merged", **ONE_HEAD))
    assert text == (
        f"extract.layer: 'merged' is out of range, allowed: null or an index, as {name} merges no patches"
    )


@pytest.mark.parametrize(
    ("layer", "heads", "width"), [(None, 7, 3584), ("merged", 7, 3584), (31, 5, 1280), (-1, 5, 1280)]
)
def test_heads_divide_the_width_of_the_layer_that_is_read(write, message, layer, heads, width):
    chosen = {"encoder": "qwen2.5-vl-7b", "extract__layer": layer, "distill__heads": 1}
    assert config.load("pretrain", write(pretrain__heads=heads, **chosen)).pretrain.heads == heads
    text = message(write(pretrain__heads=12 - heads, **chosen))
    assert text.startswith(f"pretrain.heads: {12 - heads} is out of range, allowed: a divisor of {width}, ")


def test_bounds_of_an_images_area_reach_encoder_and_model(write):
    path = write(encoder="qwen2.5-vl-7b", min_pixels=200_704, max_pixels=1_605_632, **ONE_HEAD)
    params = config.load("models", path)
    for preset in (params.encoder, params.vlm):
        assert (preset.min_pixels, preset.max_pixels) == (200_704, 1_605_632)
    assert (params.min_pixels, params.max_pixels) == (200_704, 1_605_632), "declared to DVC"
    params = config.load("models", write(encoder="qwen2.5-vl-7b", max_pixels=1_605_632, **ONE_HEAD))
    assert (params.encoder.min_pixels, params.vlm.min_pixels) == (3_136, None)
    own = config.load("models", write(encoder="org/tower", vlm="org/model", max_pixels=99))
    assert own.encoder.max_pixels == own.vlm.max_pixels == 99


@pytest.mark.parametrize(
    ("name", "bounds", "told"),
    [
        ("qwen2.5-vl-7b", {"min_pixels": 900, "max_pixels": 800},
         "min_pixels: 900 * at most max_pixels, 800"),
        ("qwen2.5-vl-7b", {"max_pixels": 3_000}, "min_pixels: 3136 * at most max_pixels, 3000"),
        ("gemma-3-4b", {"min_pixels": 9},
         "min_pixels: 9 * null, as gemma-3-4b sets the size of images itself"),
        ("smolvlm-500m@v1", {"max_pixels": 9},
         "max_pixels: 9 * null, as smolvlm-500m@v1 sets the size of images itself"),
    ],
)  # fmt: skip
def test_bounds_that_cannot_be_met_are_refused(write, message, name, bounds, told):
    text = message(write(encoder=name, **bounds, **ONE_HEAD))
    assert text == told.replace("*", "is out of range, allowed:")


@pytest.mark.parametrize("name", [name for name, preset in ENCODERS.items() if name != preset.path])
def test_the_path_of_an_encoder_is_its_preset(tmp_path, write, name):
    preset = ENCODERS[name]
    assert (
        config.load("evaluate", write(encoder=preset.path, vlm=str(tmp_path), **ONE_HEAD)).encoder == preset
    )


@pytest.mark.parametrize("name", VLMS)
def test_the_path_of_a_model_is_its_preset(tmp_path, write, message, name):
    preset = VLMS[name]
    assert preset.encoder
    for encoder in (preset.encoder, ENCODERS[preset.encoder].path):
        assert config.load("evaluate", write(encoder=encoder, vlm=preset.path, **ONE_HEAD)).vlm == preset
    refused = message(write(encoder="facebook/dinov2-base", vlm=preset.path))
    assert f"vlm: {preset.path!r} does not read encoder 'dinov2-base', allowed: no preset" in refused
    # Whether it reads a tower of the user's own, only the two can tell.
    own = config.load("evaluate", write(encoder=str(tmp_path), vlm=preset.path)).vlm
    kind = preset.model_type if (ROOT / preset.path).is_dir() else None
    assert own == VlmPreset(name=preset.path, path=preset.path, encoder=None, model_type=kind)


def test_auto_finds_the_model_by_the_path_of_the_encoder(labels):
    found = labels(encoder="openai/clip-vit-large-patch14-336", **ONE_HEAD)
    assert found == {"encoder": "clip-vit-large-patch14-336", "vlm": "llava-next-7b"}


def test_a_folder_or_a_hub_id_stands_for_encoder_and_model(tmp_path, write):
    path = write(encoder="org/tower", vlm=str(tmp_path))
    params = config.load("evaluate", path)
    assert params.encoder == EncoderPreset(name="org/tower", path="org/tower", layer=-2)
    assert params.vlm == VlmPreset(name=str(tmp_path), path=str(tmp_path), encoder=None)
    assert params.raw()["vlm"] == str(tmp_path)


@pytest.mark.parametrize("name", ["llava-1.5-7b", "llava-hf/llava-1.5-7b-hf"])
def test_a_revision_stands_behind_a_preset_or_a_hub_id(write, name):
    path = write(encoder="clip-vit-large-patch14-336@v1", vlm=f"{name}@refs/pr/7", **ONE_HEAD)
    params = config.load("evaluate", path)
    preset = ENCODERS["clip-vit-large-patch14-336"]
    assert params.encoder == replace(
        preset, name=f"{preset.name}@v1", path="openai/clip-vit-large-patch14-336@v1"
    )
    assert params.vlm.path == "llava-hf/llava-1.5-7b-hf@refs/pr/7" and not params.vlm.stored
    assert params.raw()["vlm"] == "llava-1.5-7b@refs/pr/7", "results say which revision was asked for"
    assert config.load("evaluate", write(encoder="org/tower@v2", vlm="org/model")).encoder == (
        EncoderPreset("org/tower@v2", "org/tower@v2")
    )


@pytest.mark.parametrize("name", ["micro@v1", "data/micro/llava@v1", "org/name@", "org/name@a b"])
def test_only_what_is_on_the_hub_has_revisions(write, message, name):
    refused = message(write(encoder=name, vlm="org/model"))
    assert f"encoder: {name!r} is unknown, allowed: " in refused and "org/name@revision" in refused


def test_presets_are_known_by_their_own_names_and_lie_in_a_folder_or_on_the_hub():
    assert {"dinov2-small", "dinov2-base", "clip-vit-large-patch14-336"} < set(ENCODERS)
    for name, preset in ENCODERS.items():
        assert preset.name == name
        assert (ROOT / preset.path).is_dir() or preset.path.count("/") == 1


@pytest.mark.parametrize("name", [*ENCODERS, *VLMS])
def test_presets_on_the_hub_are_pinned_to_a_commit(name):
    """Without a revision of the user's own, the same parameters read the same weights, whenever run."""
    preset = ENCODERS.get(name) or VLMS[name]
    if not (ROOT / preset.path).is_dir():
        hub_id, _, commit = preset.path.partition("@")
        assert re.fullmatch("[0-9a-f]{40}", commit)
        known = ENCODERS if name in ENCODERS else VLMS
        assert find_preset(known, hub_id) == find_preset(known, name) == preset
        assert find_preset(known, f"{hub_id}@main").path == f"{hub_id}@main"


@pytest.mark.parametrize("name", ["", "x\0y", "a" * 5000, "a/b\n", "a/" * 3000])
@pytest.mark.parametrize("key", ["encoder", "vlm"])
def test_a_name_that_no_folder_can_have_is_unknown(write, message, key, name):
    text = message(write(**{key: name}))
    assert text.startswith(f"{key}: ") and len(text) < 1000


def test_the_width_of_a_preset_in_a_folder_is_that_of_its_files():
    from atr.cli.image_tokens import features_of

    micro = ENCODERS["micro"]
    files = replace(micro, path=str(ROOT / micro.path), width=None)
    assert features_of(files, None, (168, 168)).width == micro.width


def test_a_new_file_in_the_folder_is_a_preset(tmp_path):
    (tmp_path / "mine.yaml").write_text("path: org/tower@v1\nlayer: 3\n")
    assert read_presets(EncoderPreset, tmp_path) == {"mine": EncoderPreset("mine", "org/tower@v1", layer=3)}


def test_the_model_that_auto_takes_comes_first(tmp_path):
    for name, auto in (("a", "false"), ("b", "true"), ("c", "false")):
        (tmp_path / f"{name}.yaml").write_text(f"path: org/{name}\nencoder: tower\nauto: {auto}\n")
    assert list(read_presets(VlmPreset, tmp_path)) == ["b", "a", "c"]


def test_at_most_one_shipped_model_of_an_encoder_is_marked_for_auto():
    marked = [preset.encoder for preset in VLMS.values() if preset.auto]
    assert len(marked) == len(set(marked)) > 0


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (
            "path: org/tower\nlayer: mergd\n",
            "layer: 'mergd' is out of range, allowed: null, merged, or -1024",
        ),
        ("path: org/tower\nlayers: 3\n", "layers: 3 is an unknown key, allowed: name, path, layer"),
        ("layer: 3\n", "path: missing"),
        ("[1, 2]", "allowed: a preset in YAML"),
        ("path: [", "allowed: a preset in YAML"),
    ],
)
def test_a_file_that_is_no_preset_is_named_in_one_line(tmp_path, text, named):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(config.ConfigError) as caught:
        read_presets(EncoderPreset, tmp_path)
    assert str(caught.value).startswith(f"{path}: ") and named in str(caught.value)
    assert "\n" not in str(caught.value)
