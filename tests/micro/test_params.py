from dataclasses import fields
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from atr import config
from atr.config import loader
from atr.micro import params
from atr.micro.params import PARAMETERS, Micro, MicroDinov2, MicroFeatures, MicroProbe

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "data/micro/params.yaml"


def message(folder, key, value):
    tree = OmegaConf.load(SHIPPED)
    OmegaConf.update(tree, key, value, force_add=True)
    OmegaConf.save(tree, folder / "params.yaml")
    with pytest.raises(config.ConfigError) as caught:
        params.load_micro("micro_probe", folder / "params.yaml")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_shipped_file_states_every_parameter():
    tree = OmegaConf.load(SHIPPED)
    for name, kind in PARAMETERS.sections.items():
        assert list(tree[name]) == [field.name for field in fields(kind)]
    assert list(tree) == list(PARAMETERS.keys)


@pytest.mark.parametrize("stage", PARAMETERS.stages)
def test_a_stage_gets_what_it_declares_and_nothing_else(stage):
    declared = params.load_micro(stage, SHIPPED)
    assert list(declared.raw()) == list(PARAMETERS.stages[stage])
    for key in set(PARAMETERS.keys) - set(declared.raw()):
        with pytest.raises(AssertionError, match=key):
            getattr(declared, key)


def test_the_file_is_found_from_the_root_of_the_project(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert params.load_micro("micro").raw() == params.load_micro("micro", SHIPPED).raw()
    assert params.load_micro("micro").labels() == {}, "the file names neither encoder nor model"


def test_a_wrong_value_ends_a_stage_with_one_line(tmp_path, capsys):
    tree = OmegaConf.load(SHIPPED)
    tree.micro.steps = 0
    OmegaConf.save(tree, tmp_path / "params.yaml")
    with pytest.raises(SystemExit, match="2"):
        params.load_micro_or_exit("micro_probe", tmp_path / "params.yaml")
    assert capsys.readouterr().err == (
        "atr micro_probe: micro.steps: 0 is out of range, allowed: 1 <= steps <= 2147483647\n"
    )


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("micro.steps", 0, "1 <= steps"),
        ("micro.reading", 1.0, "reading < 1"),
        ("micro.width", 100, "a multiple of 64"),
        ("micro.learning_rate", 0.0, "0 < learning_rate"),
        ("micro.epochs", 7, "a divisor of steps"),
        ("micro.layers", 0, "1 <= layers"),
        ("micro.text_layers", 0, "1 <= text_layers"),
        ("micro.reading_layer", -1, "0 <= reading_layer <= layers, 4"),
        ("micro.naming_layer", 5, "0 <= naming_layer <= layers, 4"),
        ("micro_dinov2.new_layers", -1, "0 <= new_layers"),
        ("micro_dinov2.steps", 0, "1 <= steps"),
        ("micro_dinov2.epochs", 9, "a divisor of steps"),
        ("micro_dinov2.layers", 4, "new_layers"),
        ("micro_features.charts", 1.0, "0 <= charts < 1"),
        ("micro_features.images", 1, "2 <= images"),
        ("micro_features.reading", 1.0, "0 < reading < 1"),
        ("micro_features.reading", 0.0, "0 < reading < 1"),
        ("micro_features.batch_size", 0, "1 <= batch_size"),
        ("micro_features.workers", -1, "0 <= workers"),
        ("micro_probe.images", 3, "4 <= images"),
        ("micro_probe.sizes", [224, 230], "multiples of 14"),
        ("micro_probe.sizes", [], "multiples of 14"),
    ],
)
def test_a_bad_value_is_named_with_what_is_allowed(tmp_path, key, value, allowed):
    text = message(tmp_path, key, value)
    assert text.startswith(f"{key}: ") and allowed in text.partition("allowed: ")[2]


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (Micro, {"reading": 0.0, "constant": 0.0, "workers": 0, "width": 64, "steps": 1, "epochs": 1}),
        (Micro, {"reading_layer": 0, "naming_layer": 4}),
        (MicroDinov2, {"new_layers": 0}),
        (MicroProbe, {"images": 4, "sizes": [14]}),
        (MicroFeatures, {"images": 2, "reading": 0.5, "charts": 0.0}),
    ],
)
def test_the_ends_of_a_range_are_allowed(kind, values):
    section = loader.build(kind, "", values)
    assert {key: getattr(section, key) for key in values} == values


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (Micro, {"reading": 1.0}),
        (Micro, {"width": 0}),
        (MicroProbe, {"sizes": [0]}),
        (MicroProbe, {"sizes": [28, 28]}),
    ],
)
def test_what_lies_just_beyond_is_not(kind, values):
    with pytest.raises(config.ConfigError, match=f"^{next(iter(values))}: .* allowed: "):
        loader.build(kind, "", values)
