import inspect
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from atr import config

ROOT = Path(__file__).parents[2]
ONE_HEAD = {"pretrain__heads": 1, "distill__heads": 1}
"""A divisor of every encoder's width."""
SHIPPED = ROOT / "params.yaml"
HEAVY = {"torch", "lightning", "transformers", "mlflow", "pandas", "sklearn", "matplotlib"}


def write(folder: Path, **changes: Any) -> Path:
    """The shipped parameters with changes by dotted key (`__` for the dot)."""
    tree = OmegaConf.load(SHIPPED)
    for key, value in changes.items():
        OmegaConf.update(tree, key.replace("__", "."), value, force_add=True)
    path = folder / "params.yaml"
    OmegaConf.save(tree, path)
    return path


def message(path: Path) -> str:
    with pytest.raises(config.ConfigError) as caught:
        config.load("pretrain", path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_shipped_file_states_every_parameter():
    tree = OmegaConf.load(SHIPPED)
    for name, kind in config._SECTIONS.items():
        assert list(tree[name]) == [key.name for key in fields(kind)]
    assert set(tree) == set(config._KEYS)


@pytest.mark.parametrize("stage", config.STAGES)
def test_a_stage_gets_what_it_declares_and_nothing_else(stage):
    params = config.load(stage, SHIPPED)
    declared = [key.partition(".")[0] for key in config.STAGES[stage]]
    assert list(params.raw()) == declared
    for key in config._KEYS:
        if key in declared:
            getattr(params, key)
        else:
            with pytest.raises(AssertionError, match=key):
                getattr(params, key)


def test_parameters_are_read_only_and_raw_is_a_copy():
    params = config.load("evaluate", SHIPPED)
    with pytest.raises(AttributeError):
        params.seed = 1
    with pytest.raises(FrozenInstanceError):
        params.evaluate.batch_size = 1
    params.raw()["evaluate"]["keep"].clear()
    assert params.evaluate.keep == params.raw()["evaluate"]["keep"] != []
    assert not hasattr(params, "no_such_parameter")


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        # misspelt
        ("pretrain.learning_rat", 0.1, "learning_rate"),
        ("pretain", {"layers": 3}, "pretrain"),
        ("sed", 1, "seed"),
        # of a wrong type
        ("seed", "seven", "int"),
        ("pretrain.layers", "three", "int"),
        ("pretrain.layers", 2.5, "int"),
        ("pretrain.layers", True, "int"),
        ("pretrain.layers", None, "int"),
        ("pretrain.keep", {"a": 1}, "float"),
        ("extract.layer", "last", "int | None"),
        ("evaluate.keep", 0.5, "list[float]"),
        ("evaluate.keep", [0.5, "half"], "list[float]"),
        ("prepare.benchmarks", "docs", "list[str]"),
        ("report", None, "pages"),
        ("report", 3, "pages"),
        # not written out
        ("pretrain.epochs", "${seed}", "int"),
        ("pretrain.epochs", "???", "int"),
        # out of range
        ("seed", -1, "0 <= seed"),
        ("seed", 2**32, "2**32"),
        ("trainer.devices", 0, "auto"),
        ("trainer.devices", -2, "auto"),
        ("trainer.devices", True, "auto"),
        ("trainer.devices", "all", "auto"),
        ("trainer.devices", [], "indices"),
        ("trainer.devices", [0, 0], "distinct"),
        ("trainer.num_nodes", 0, "num_nodes >= 1"),
        ("prepare.source", "no/such/folder", "folder"),
        ("prepare.source", "cocoa", "coco"),
        ("prepare.repository", "no/such/folder", "hub"),
        ("prepare.images", 0, "images >= 1"),
        ("prepare.questions", -5, "questions >= 1"),
        ("prepare.benchmarks", [], "docs"),
        ("prepare.benchmarks", ["docs", "docs"], "once"),
        ("extract.batch_size", 0, ">= 1"),
        ("extract.shard_images", 0, ">= 1"),
        ("extract.workers", -1, ">= 0"),
        ("pretrain.layers", 0, "layers >= 1"),
        ("pretrain.heads", 0, "heads >= 1"),
        ("pretrain.heads", 5, "a divisor of 192, the width of micro"),
        ("distill.heads", 7, "a divisor of 192, the width of micro"),
        ("pretrain.ffn_ratio", 0.0001, "0.1 <= ffn_ratio"),
        ("pretrain.keep", 1.5, "0 < keep < 1"),
        ("pretrain.keep", 0.0, "0 < keep < 1"),
        ("pretrain.keep", float("nan"), "0 < keep < 1"),
        ("pretrain.temperature", 0.0, "0.01 <= temperature <= 100"),
        ("pretrain.initial_bias", float("inf"), "initial_bias <= 20"),
        ("pretrain.learning_rate", 0.0, "0 < learning_rate"),
        ("pretrain.weight_decay", -0.1, "0 <= weight_decay"),
        ("pretrain.warmup", 1.0, "warmup < 1"),
        ("pretrain.epochs", 0, "epochs >= 1"),
        ("pretrain.batch_size", 0, "batch_size >= 1"),
        ("pretrain.validation", 1.0, "validation < 1"),
        ("pretrain.collapse_after", 2.0, "collapse_after <= 1"),
        ("pretrain.mask_images", 0, "mask_images >= 1"),
        ("evaluate.keep", [], "fractions"),
        ("evaluate.keep", [0.5, 0.5], "distinct"),
        ("evaluate.keep", [0.5, 0.0], "0 < keep <= 1"),
        ("evaluate.keep", [0.5, 0.5000000001], "of six digits"),
        ("evaluate.keep", [step / 200 for step in range(1, 201)], "1 to 100"),
        ("evaluate.random_seeds", 0, ">= 1"),
        ("evaluate.batch_size", 0, ">= 1"),
        ("evaluate.max_new_tokens", 0, ">= 1"),
        ("evaluate.bootstrap", 0, ">= 1"),
        ("report.best", "full", "selector"),
        ("report.best", "divprune", "random, selector, distilled"),
        ("report.best", "distilled_ranking", "random, selector, distilled"),
        ("report.best", "selector_adaptive", "selector"),
        ("intrinsic.images", 0, "images >= 1"),
        ("intrinsic.pretrain_images", 0, "pretrain_images >= 1"),
        ("intrinsic.epochs", 0, "epochs >= 1"),
        ("intrinsic.overlap_keep", 1.5, "overlap_keep <= 1"),
        ("intrinsic.training_seeds", 0, "training_seeds >= 1"),
        ("robustness.questions", 0, "questions >= 1"),
        ("robustness.keep", [], "fractions"),
        ("robustness.keep", [0.5, 1.5], "0 < keep <= 1"),
        ("latency.kept", [], "fractions"),
        ("latency.kept", [0.5, 1.5], "0 < kept <= 1"),
        ("latency.batches", [1, 1], "distinct"),
        ("latency.batches", [0], ">= 1"),
        ("distill.epochs", 0, "epochs >= 1"),
        ("distill.lowest", 0.0, "0 < lowest < 1"),
        ("distill.highest", 0.01, "distill.lowest, 0.05, <= highest <= 1"),
        ("distill.learning_rate", 0.0, "0 < learning_rate"),
        ("distill.temperature", float("inf"), "temperature <= 100"),
        ("distill.position", "absolute", "none, sine"),
        ("distill.ffn_ratio", 17.0, "ffn_ratio <= 16"),
        ("prepare.split", "train", "evaluate, validation"),
        ("prepare.prompts", [], "one or more texts"),
        ("prepare.prompts", [" "], "one or more texts"),
        ("evaluate.distilled", ["selector"], "distilled, distilled_ranking"),
        ("latency.seconds", 0.0, "0 < seconds"),
        ("report.pages", 4, "pages <= 3"),
        ("report.examples", 0, "examples >= 1"),
        ("report.examples", 5000, "at most 60"),
        ("micro.steps", 0, "steps >= 1"),
        ("micro.reading", 1.0, "reading < 1"),
        ("micro.width", 100, "a multiple of 64"),
        ("micro.learning_rate", 0.0, "0 < learning_rate"),
        ("micro.epochs", 7, "a divisor of micro.steps"),
        ("micro.layers", 0, "layers >= 1"),
        ("micro.text_layers", 0, "text_layers >= 1"),
        ("micro.reading_layer", -1, "0 <= reading_layer <= layers, 4"),
        ("micro.naming_layer", 5, "0 <= naming_layer <= layers, 4"),
        ("micro_dinov2.new_layers", -1, "new_layers >= 0"),
        ("micro_features.charts", 1.0, "0 <= charts < 1"),
        ("micro_dinov2.steps", 0, "steps >= 1"),
        ("micro_dinov2.epochs", 9, "a divisor of micro_dinov2.steps"),
        ("micro_dinov2.layers", 4, "new_layers"),
        ("micro_probe.images", 3, "images >= 4"),
        ("micro_probe.sizes", [224, 230], "multiples of 14"),
        ("micro_probe.sizes", [], "multiples of 14"),
        ("micro_features.images", 1, "images >= 2"),
        ("micro_features.reading", 1.0, "0 < reading < 1"),
        ("micro_features.reading", 0.0, "0 < reading < 1"),
        ("micro_features.batch_size", 0, "batch_size >= 1"),
        ("micro_features.workers", -1, "workers >= 0"),
        # unknown names
        ("trainer.accelerator", "quantum", "cuda"),
        ("trainer.strategy", "ddp_spawn", "auto, ddp"),
        ("trainer.strategy", "fsdp", "auto, ddp"),
        ("trainer.strategy", "ddp_find_unused_parameters_false", "auto, ddp"),
        ("trainer.strategy", "deepspeed_stage_2", "auto, ddp"),
        ("trainer.precision", "int8", "bf16-mixed"),
        ("trainer.precision", "bf16-true", "bf16-mixed"),
        ("trainer.precision", "16-true", "bf16-mixed"),
        ("pretrain.position", "learned", "sine"),
        ("pretrain.normalise", "layer", "variance"),
        ("evaluate.positions", "gappy", "contiguous"),
        ("evaluate.budget", "row", "image, tile"),
        ("evaluate.newline", "drop", "keep, follow"),
        ("evaluate.interpolation", "bilinear", "model, off"),
        ("evaluate.reducers", ["full", "best"], "random"),
        ("evaluate.reducers", ["selector"], "random"),
        ("evaluate.reducers", ["random", "none"], "full"),
        ("evaluate.selectors", ["selector_adaptive"], "selector"),
        ("prepare.benchmarks", ["docs", "docsvqa"], "docvqa"),
        ("encoder", "clip", "micro"),
        ("encoder", "tests/no-such-tower", "folder"),
        ("vlm", "llava", "micro"),
        ("vlm", None, "str"),
    ],
)
def test_a_bad_value_is_named_with_what_is_allowed(tmp_path, monkeypatch, key, value, allowed):
    monkeypatch.chdir(ROOT)
    text = message(write(tmp_path, **{key.replace(".", "__"): value}))
    assert text.startswith(f"{key}: ")
    assert any(str(shown) in text for shown in (value, *(value if isinstance(value, list) else ())))
    assert allowed in text.partition("allowed: ")[2]


@pytest.mark.parametrize(
    ("section", "values"),
    [
        (config.Common, {"seed": 0}),
        (config.Common, {"seed": 2**32 - 1}),
        (config.Trainer, {"devices": -1, "num_nodes": 1}),
        (config.Prepare, {"images": 1, "questions": 1}),
        (config.Extract, {"batch_size": 1, "shard_images": 1, "workers": 0}),
        (config.Pretrain, {"warmup": 0.0, "weight_decay": 0.0, "learning_rate": 1.0, "ffn_ratio": 16.0}),
        (config.Pretrain, {"initial_bias": -20.0, "collapse_after": 1.0, "mask_images": 1}),
        (config.Pretrain, {"initial_bias": 20.0, "layers": 1, "heads": 1, "epochs": 1, "batch_size": 1}),
        (config.Distill, {"lowest": 0.3, "highest": 0.3}),
        (config.Distill, {"highest": 1.0, "images": 1, "max_new_tokens": 1}),
        (config.Evaluate, {"keep": [1.0], "random_seeds": 1, "batch_size": 1, "bootstrap": 1}),
        (config.Intrinsic, {"overlap_keep": 1.0, "images": 1, "training_seeds": 1}),
        (config.Latency, {"kept": [1.0], "batches": [1], "seconds": 60.0}),
        (config.Report, {"pages": 1, "examples": 1}),
        (config.Report, {"pages": 3}),
        (config.Micro, {"reading": 0.0, "constant": 0.0, "workers": 0, "width": 64, "steps": 1, "epochs": 1}),
        (config.Micro, {"reading_layer": 0, "naming_layer": 4}),
        (config.MicroDinov2, {"new_layers": 0}),
        (config.MicroProbe, {"images": 4, "sizes": [14]}),
        (config.MicroFeatures, {"images": 2, "reading": 0.5, "charts": 0.0}),
    ],
)
def test_the_ends_of_a_range_are_allowed(section, values):
    made = section(**values)
    assert {key: getattr(made, key) for key in values} == values


@pytest.mark.parametrize(
    ("section", "values"),
    [
        (config.Pretrain, {"keep": 1.0}),
        (config.Pretrain, {"validation": 0.0}),
        (config.Pretrain, {"collapse_after": 0.0}),
        (config.Distill, {"lowest": 1.0, "highest": 1.0}),
        (config.Intrinsic, {"overlap_keep": 0.0}),
        (config.Latency, {"kept": [0.0]}),
        (config.Latency, {"kept": [0.5, 0.5]}),
        (config.Report, {"pages": 0}),
        (config.Micro, {"reading": 1.0}),
        (config.Micro, {"width": 0}),
        (config.MicroProbe, {"sizes": [0]}),
        (config.MicroProbe, {"sizes": [28, 28]}),
    ],
)
def test_what_lies_just_beyond_is_not(section, values):
    with pytest.raises(config.ConfigError, match=f"{next(iter(values))}: .* allowed: "):
        section(**values)


@pytest.mark.parametrize("key", [*config._KEYS])
def test_a_missing_key_is_named(tmp_path, key):
    tree = OmegaConf.load(SHIPPED)
    del tree[key]
    OmegaConf.save(tree, tmp_path / "params.yaml")
    text = message(tmp_path / "params.yaml")
    assert text.startswith(f"{key}: missing") and "params.yaml" in text


@pytest.mark.parametrize(
    "content",
    [
        "seed: [1",
        "- seed\n- encoder",
        "",
        "just words",
        "a: &a [*a]",
        "date: 2024-13-45",
        "seed: 1\nseed: 2",
        "seed: 1\n\tencoder: micro",
        "a: ${",
        b"\xff\xfe",
    ],
)
def test_a_file_that_is_no_mapping_is_named(tmp_path, content):
    path = tmp_path / "params.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert "params.yaml" in message(path)


def test_a_missing_file_and_a_folder_in_its_place_are_named(tmp_path):
    assert "params.yaml: no such file" in message(tmp_path / "params.yaml")
    assert str(tmp_path) in message(tmp_path)


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("seed", "010"),
        ("seed", "0o10"),
        ("seed", "08"),
        ("seed", "1:30"),
        ("pretrain.epochs", "010"),
        ("pretrain.learning_rate", "0:0.5"),
        ("pretrain.position", "no"),
        ("prepare.source", "2024-01-01"),
        ("prepare.benchmarks", "[docs, on]"),
        ("evaluate.keep", "[0.1, 00:0.5]"),
        ("latency.batches", "[1, 010]"),
        ("micro.compile", "yes"),
        ("trainer.devices", "[010]"),
    ],
)
def test_what_two_versions_of_yaml_read_differently_is_refused_by_name(tmp_path, key, text):
    section, _, name = key.rpartition(".")
    head, found, tail = SHIPPED.read_text().partition(f"\n{section}:" if section else "\n")
    path = tmp_path / "params.yaml"
    path.write_text(head + found + re.sub(rf"\b{name}: .*", f"{name}: {text}", tail, count=1))
    told = message(path)
    assert re.match(rf"{key}: .* in YAML 1.2, which DVC reads, is .* in YAML 1.1, allowed: ", told)


@pytest.mark.parametrize("text", ["1_000", "1e3", "0x3e8", "'1000'", "+1000"])
def test_a_stage_reads_a_number_as_dvc_does(tmp_path, text):
    from dvc.utils.serialize import load_yaml

    path = tmp_path / "params.yaml"
    path.write_text(SHIPPED.read_text().replace("steps: 26000", f"steps: {text}", 1))
    recorded = load_yaml(str(path))["micro"]["steps"]
    if isinstance(recorded, float):
        assert message(path).startswith("micro.steps: 1000.0 has a wrong type")
    else:
        assert config.load("micro", path).micro.steps == int(recorded) == 1000


@pytest.mark.parametrize("text", ["off", "'off'"])
def test_a_bare_off_is_a_word(tmp_path, text):
    path = tmp_path / "params.yaml"
    path.write_text(SHIPPED.read_text().replace("interpolation: model", f"interpolation: {text}"))
    assert config.load("evaluate", path).evaluate.interpolation == "off"


@pytest.mark.parametrize("text", ["3e-4", "'3e-4'", "0.0003"])
def test_an_exponent_without_a_dot_is_a_number(tmp_path, text):
    path = tmp_path / "params.yaml"
    path.write_text(re.sub(r"learning_rate: \S+", f"learning_rate: {text}", SHIPPED.read_text(), count=1))
    assert config.load("pretrain", path).pretrain.learning_rate == 0.0003


@pytest.fixture
def two_encoders(monkeypatch):
    """A world with a second encoder and its model, and a third encoder that no model reads."""
    more = {name: config.EncoderPreset(name=name, path=f"x/{name}") for name in ("siglip", "blind")}
    monkeypatch.setattr(config, "ENCODERS", config.ENCODERS | more)
    vlm = config.VlmPreset(name="onevision", path="x/onevision", encoder="siglip")
    monkeypatch.setattr(config, "VLMS", config.VLMS | {"onevision": vlm})


def test_auto_takes_the_model_that_reads_the_encoder(tmp_path, two_encoders):
    assert config.labels(write(tmp_path)) == {"encoder": "micro", "vlm": "micro"}
    assert config.labels(write(tmp_path, encoder="siglip")) == {"encoder": "siglip", "vlm": "onevision"}


def test_an_impossible_pair_names_the_models_that_read_the_encoder(tmp_path, two_encoders):
    assert "allowed: onevision, a folder" in message(write(tmp_path, encoder="siglip", vlm="micro"))
    assert "'micro' does not read encoder 'siglip'" in message(write(tmp_path, encoder="siglip", vlm="micro"))
    assert "'auto' finds no model that reads encoder 'blind'" in message(write(tmp_path, encoder="blind"))
    assert "'micro' does not read" in message(write(tmp_path, encoder="org/tower", vlm="micro"))


@pytest.mark.parametrize(
    "encoder, readers",
    [
        ("dinov2-small", ["micro-dinov2"]),
        ("clip-vit-large-patch14-336", ["llava-next-7b", "llava-1.5-7b"]),
        ("siglip-so400m-patch14-384", ["llava-onevision-7b"]),
    ],
)
def test_encoders_have_their_models(tmp_path, encoder, readers):
    assert config.labels(write(tmp_path, encoder=encoder, **ONE_HEAD))["vlm"] == readers[0]
    for name in readers:
        assert (
            config.load("evaluate", write(tmp_path, encoder=encoder, vlm=name, **ONE_HEAD)).vlm
            == config.VLMS[name]
        )
    refused = message(write(tmp_path, encoder=encoder, vlm="micro"))
    assert f"'micro' does not read encoder {encoder!r}, allowed: {', '.join(readers)}, a folder" in refused


@pytest.mark.parametrize("name", [name for name, preset in config.ENCODERS.items() if name != preset.path])
def test_the_path_of_an_encoder_is_its_preset(tmp_path, name):
    preset = config.ENCODERS[name]
    assert (
        config.load("evaluate", write(tmp_path, encoder=preset.path, vlm=str(tmp_path), **ONE_HEAD)).encoder
        == preset
    )


@pytest.mark.parametrize("name", config.VLMS)
def test_the_path_of_a_model_is_its_preset(tmp_path, name):
    preset = config.VLMS[name]
    assert preset.encoder
    for encoder in (preset.encoder, config.ENCODERS[preset.encoder].path):
        assert (
            config.load("evaluate", write(tmp_path, encoder=encoder, vlm=preset.path, **ONE_HEAD)).vlm
            == preset
        )
    refused = message(write(tmp_path, encoder="facebook/dinov2-base", vlm=preset.path))
    assert f"vlm: {preset.path!r} does not read encoder 'dinov2-base', allowed: no preset" in refused
    # Whether it reads a tower of the user's own, only the two can tell.
    own = config.load("evaluate", write(tmp_path, encoder=str(tmp_path), vlm=preset.path)).vlm
    assert own == config.VlmPreset(name=preset.path, path=preset.path, encoder=None)


def test_auto_finds_the_model_by_the_path_of_the_encoder(tmp_path):
    labels = config.labels(write(tmp_path, encoder="openai/clip-vit-large-patch14-336", **ONE_HEAD))
    assert labels == {"encoder": "clip-vit-large-patch14-336", "vlm": "llava-next-7b"}


def test_a_folder_or_a_hub_id_stands_for_encoder_and_model(tmp_path):
    path = write(tmp_path, encoder="org/tower", vlm=str(tmp_path))
    params = config.load("evaluate", path)
    assert params.encoder == config.EncoderPreset(name="org/tower", path="org/tower", layer=-2)
    assert params.vlm == config.VlmPreset(name=str(tmp_path), path=str(tmp_path), encoder=None)
    assert params.raw()["vlm"] == str(tmp_path)


@pytest.mark.parametrize("name", ["llava-1.5-7b", "llava-hf/llava-1.5-7b-hf"])
def test_a_revision_stands_behind_a_preset_or_a_hub_id(tmp_path, name):
    path = write(tmp_path, encoder="clip-vit-large-patch14-336@v1", vlm=f"{name}@refs/pr/7", **ONE_HEAD)
    params = config.load("evaluate", path)
    preset = config.ENCODERS["clip-vit-large-patch14-336"]
    assert params.encoder == replace(
        preset, name=f"{preset.name}@v1", path="openai/clip-vit-large-patch14-336@v1"
    )
    assert params.vlm.path == "llava-hf/llava-1.5-7b-hf@refs/pr/7" and not params.vlm.stored
    assert params.raw()["vlm"] == "llava-1.5-7b@refs/pr/7", "results say which revision was asked for"
    assert config.load("evaluate", write(tmp_path, encoder="org/tower@v2", vlm="org/model")).encoder == (
        config.EncoderPreset("org/tower@v2", "org/tower@v2")
    )


@pytest.mark.parametrize("name", ["micro@v1", "data/micro/llava@v1", "org/name@", "org/name@a b"])
def test_only_what_is_on_the_hub_has_revisions(tmp_path, name):
    refused = message(write(tmp_path, encoder=name, vlm="org/model"))
    assert f"encoder: {name!r} is unknown, allowed: " in refused and "org/name@revision" in refused


def test_presets_are_known_by_their_own_names_and_lie_in_a_folder_or_on_the_hub():
    assert {"dinov2-small", "dinov2-base", "clip-vit-large-patch14-336"} < set(config.ENCODERS)
    for name, preset in config.ENCODERS.items():
        assert preset.name == name
        assert (ROOT / preset.path).is_dir() or preset.path.count("/") == 1


@pytest.mark.parametrize("name", [*config.ENCODERS, *config.VLMS])
def test_presets_on_the_hub_are_pinned_to_a_commit(tmp_path, name):
    """Without a revision of the user's own, the same parameters read the same weights, whenever run."""
    preset = config.ENCODERS.get(name) or config.VLMS[name]
    if not (ROOT / preset.path).is_dir():
        hub_id, _, commit = preset.path.partition("@")
        assert re.fullmatch("[0-9a-f]{40}", commit)
        presets = config.ENCODERS if name in config.ENCODERS else config.VLMS
        assert config._preset(presets, hub_id) == config._preset(presets, name) == preset
        assert config._preset(presets, f"{hub_id}@main").path == f"{hub_id}@main"


@pytest.mark.parametrize("prompt", ["What is this???", "???!", "Is it 50 $ {or more}?"])
def test_a_prompt_may_hold_what_omegaconf_has_a_use_for(tmp_path, prompt):
    assert config.load("prepare", write(tmp_path, prepare__prompts=[prompt])).prepare.prompts == [prompt]


@pytest.mark.parametrize("prompts", [["???"], ["Which?", "${seed}"]])
def test_a_prompt_that_omegaconf_would_not_read_as_text_is_named(tmp_path, prompts):
    path = write(tmp_path)
    path.write_text(path.read_text().replace("- Describe the image in detail.", f"- '{prompts[-1]}'"))
    assert re.match(r"prepare.prompts: .* is not a value, allowed: list\[str\], written out", message(path))


TREE = config.read(SHIPPED)
INF, NAN = float("inf"), float("nan")
NUMBERS = [0, -1, -(10**30), 10**30, 0.0, -0.5, 1e-300, 1e300, INF, -INF, NAN]
NO_NUMBERS = [True, None, "", "x", "nan", "1e999", [], [[]], {}, {"a": 1}, "0" * 5000]
NUMERIC = [
    (name, key.name)
    for name, kind in {"": config.Common, **config._SECTIONS}.items()
    for key in fields(kind)
    if re.search(r"int|float|Any", inspect.formatannotation(key.type))
]


def are_sane(value):
    """Whether it is what a library can count or compute with, or no number at all."""
    if isinstance(value, list):
        return all(map(are_sane, value))
    return not isinstance(value, int | float) or (math.isfinite(value) and abs(value) < 2**32)


def built(section, key, value):
    """The section with one value changed; None, after a look at the one line, where it is refused."""
    kind = config._SECTIONS.get(section, config.Common)
    values = TREE[section] if section else {each.name: TREE[each.name] for each in fields(kind)}
    try:
        return config._build(kind, f"{section}." if section else "", values | {key: value})
    except config.ConfigError as error:
        assert "\n" not in str(error) and "allowed: " in str(error) and len(str(error)) < 2000
        assert str(error).startswith(f"{section}.".lstrip("."))
        return None


@pytest.mark.parametrize(("section", "key"), NUMERIC)
def test_a_number_that_cannot_be_is_refused_in_one_line_whatever_the_key(section, key):
    """For every numeric key: a value is refused by name, or it is one that libraries can take."""
    for value in (*NUMBERS, *NO_NUMBERS):
        for tried in (value, [value]):
            made = built(section, key, tried)
            assert made is None or are_sane(getattr(made, key)), tried
            assert made is None or tried not in (INF, -INF, 10**30, -(10**30), 1e300), tried


TEXTS = [
    (name, key.name)
    for name, kind in {"": config.Common, **config._SECTIONS}.items()
    for key in fields(kind)
    if "str" in inspect.formatannotation(key.type)
]


@pytest.mark.parametrize(("section", "key"), TEXTS)
def test_text_that_names_nothing_is_refused_in_one_line_whatever_the_key(section, key):
    free = (section, key) in {("", "encoder"), ("", "vlm"), ("prepare", "prompts")}
    for value in ("", "x\0y", "a\nb", "a" * 5000, "../" * 2000, None, [], {}, INF, [None], [{}]):
        made = built(section, key, value)
        assert made is None or free, value


@pytest.mark.parametrize("name", ["", "x\0y", "a" * 5000, "a/b\n", "a/" * 3000])
@pytest.mark.parametrize("key", ["encoder", "vlm"])
def test_a_name_that_no_folder_can_have_is_unknown(tmp_path, key, name):
    text = message(write(tmp_path, **{key: name}))
    assert text.startswith(f"{key}: ") and len(text) < 1000


def test_the_width_of_a_preset_is_that_of_its_files():
    from atr.cli import plan

    for preset in config.ENCODERS.values():
        assert plan.features_of(str(ROOT / preset.path) if "data/" in preset.path else preset.path).width == (
            preset.width
        )


@pytest.mark.parametrize(("key", "name"), [("reducers", "tome"), ("selectors", "selector_mmr")])
def test_a_reducer_that_takes_no_tiles_is_refused_where_the_model_cuts_them(tmp_path, key, name):
    asked = {"reducers": ["full", name], "selectors": ["selector", name]}[key]
    changes = {f"evaluate__{key}": asked, **ONE_HEAD}
    tiled = write(tmp_path, encoder="clip-vit-large-patch14-336", **changes)
    text = message(tiled)
    assert text.startswith(f"evaluate.{key}: ['{asked[0]}', '{name}'] is out of range, allowed: {asked[0]}, ")
    assert "llava-next-7b cuts images into tiles" in text
    whole = write(tmp_path, encoder="clip-vit-large-patch14-336", vlm="llava-1.5-7b", **changes)
    assert name in config.load("evaluate", whole).evaluate.names


@pytest.mark.parametrize("reducers", [["full"], ["full", "none"], ["full", "random"], ["full", "tome"]])
def test_the_lines_of_the_paper_but_for_all_tokens_may_be_left_out(tmp_path, reducers):
    assert config.load("report", write(tmp_path, evaluate__reducers=reducers)).evaluate.reducers == reducers


def test_flat_names_every_parameter_once():
    table = config.flat(SHIPPED)
    assert table["seed"] == 0 and table["vlm"] == "micro" and table["pretrain.keep"] == 0.45
    assert len(table) == 3 + sum(len(fields(kind)) for kind in config._SECTIONS.values())


@pytest.mark.parametrize("devices", ["auto", -1, 1, 8, [0, 3]])
def test_the_trainer_section_is_handed_on_as_it_is(tmp_path, devices):
    trainer = config.load("extract", write(tmp_path, trainer__devices=devices, trainer__precision=32)).trainer
    assert trainer.kwargs() == {
        "accelerator": "auto",
        "devices": devices,
        "strategy": "auto",
        "precision": 32,
        "num_nodes": 1,
    }


@pytest.mark.parametrize("name", ["llava-next", "llava-onevision", None])
def test_make_compare_takes_all_that_serve_the_model(tmp_path, name):
    """The recipe as it stands, with a dvc that only says what it is told."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    write(tmp_path, **(config.read(ROOT / f"experiments/{name}.yaml") if name else {}))
    programs = tmp_path / ".venv/bin"
    programs.mkdir(parents=True)
    for program, does in (("python", f'exec "{sys.executable}" "$@"'), ("dvc", 'printf "%s\\n" "$@"')):
        (programs / program).write_text(f"#!/bin/sh\n{does}\n")
        (programs / program).chmod(0o755)
    told = subprocess.run(
        ["make", "--silent", "compare", "STAMP=params.yaml"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    every = {"reducers": config.REDUCERS, "selectors": config.SELECTORS, "distilled": config.DISTILLED}
    taken = {
        key: [other for other in names if not name or other not in config.ONE_TILE]
        for key, names in every.items()
    }
    expected = [f"evaluate.{key}=[{','.join(names)}]" for key, names in taken.items()]
    assert told.stdout.split() == ["exp", "run", *(word for each in expected for word in ("-S", each))]


def test_lightning_knows_the_names_and_takes_one_process_on_a_cpu():
    from lightning.pytorch import Trainer
    from lightning.pytorch.accelerators import AcceleratorRegistry
    from lightning.pytorch.strategies import StrategyRegistry

    from atr.core.hardware import lightning_kwargs

    assert set(config.STRATEGIES) - {"auto"} <= set(StrategyRegistry.available_strategies())
    assert set(config.ACCELERATORS) - {"auto", "gpu"} == set(AcceleratorRegistry.available_accelerators())
    kwargs = lightning_kwargs(config.Trainer(accelerator="cpu"))
    assert Trainer(**kwargs, logger=False, enable_checkpointing=False).world_size == 1


def test_a_stage_stops_in_two_seconds_with_one_line_and_nothing_heavy_loaded(tmp_path):
    write(tmp_path, pretrain__keep=1.5)
    script = f"""
import sys, time
start = time.perf_counter()
from atr import config
try:
    config.load_or_exit("pretrain")
finally:
    seconds = time.perf_counter() - start
    print(sorted({HEAVY} & set(sys.modules)), seconds < 2)
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr == "atr pretrain: pretrain.keep: 1.5 is out of range, allowed: 0 < keep < 1\n"
    assert done.stdout == "[] True\n"


@pytest.mark.parametrize("module", sorted(path.stem for path in (ROOT / "atr/stages").glob("[!_]*.py")))
def test_every_stage_checks_its_parameters_before_it_loads_anything(tmp_path, module):
    """The stage as DVC starts it; `-X importtime` tells what was loaded."""
    write(tmp_path, pretrain__keep=1.5)
    command = [sys.executable, "-X", "importtime", "-m", f"atr.stages.{module}"]
    arguments = {"extract": ["pretrain"], "evaluate": ["full"]}.get(module, [])
    done = subprocess.run(
        [*command, *arguments], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    loaded = {
        line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time")
    }
    lines = [line for line in done.stderr.splitlines() if not line.startswith("import time")]
    assert done.returncode == 2
    assert lines == [f"atr {module}: pretrain.keep: 1.5 is out of range, allowed: 0 < keep < 1"]
    assert not loaded & HEAVY
