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
    ],
)
def test_encoders_have_their_models(write, message, labels, encoder, readers):
    assert labels(encoder=encoder, **ONE_HEAD)["vlm"] == readers[0]
    for name in readers:
        assert config.load("evaluate", write(encoder=encoder, vlm=name, **ONE_HEAD)).vlm == VLMS[name]
    refused = message(write(encoder=encoder, vlm="micro"))
    assert f"'micro' does not read encoder {encoder!r}, allowed: {', '.join(readers)}, a folder" in refused


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
    assert own == VlmPreset(name=preset.path, path=preset.path, encoder=None)


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


def test_the_width_of_a_preset_is_that_of_its_files():
    from atr.cli import plan

    for preset in ENCODERS.values():
        assert plan.features_of(str(ROOT / preset.path) if "data/" in preset.path else preset.path).width == (
            preset.width
        )


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
        ("path: org/tower\nlayer: last\n", "layer: 'last' has a wrong type, allowed: int"),
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
