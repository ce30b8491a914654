import math
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import Annotated, get_type_hints

import pytest
from omegaconf import OmegaConf
from pydantic import Field
from pydantic.dataclasses import dataclass

from atr import config
from atr.config.errors import describe_type
from atr.config.fields import STRICT
from atr.config.loader import ParameterFile, build, load
from atr.config.stages import PIPELINE

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "params.yaml"


def test_the_shipped_file_states_every_parameter():
    tree = OmegaConf.load(SHIPPED)
    for name, kind in PIPELINE.sections.items():
        assert list(tree[name]) == [field.name for field in fields(kind)]
    assert list(tree) == list(PIPELINE.keys)


@pytest.mark.parametrize("stage", PIPELINE.stages)
def test_a_stage_gets_what_it_declares_and_nothing_else(stage):
    params = config.load(stage, SHIPPED)
    declared = list(dict.fromkeys(key.partition(".")[0] for key in PIPELINE.stages[stage]))
    assert list(params.raw()) == declared
    for key in PIPELINE.keys:
        if key in declared:
            getattr(params, key)
        else:
            with pytest.raises(AssertionError, match=key):
                getattr(params, key)


def test_a_stage_that_declares_a_field_gets_that_field_alone():
    params = config.load("pretrain", SHIPPED)
    assert params.raw()["evaluate"] == {"positions": params.evaluate.positions}
    assert not hasattr(params.evaluate, "keep")
    with pytest.raises(AttributeError):
        params.evaluate.positions = "contiguous"


def test_parameters_are_read_only_and_raw_is_a_copy():
    params = config.load("report", SHIPPED)
    with pytest.raises(AttributeError):
        params.evaluate = None
    with pytest.raises(FrozenInstanceError):
        params.evaluate.batch_tokens = 1
    params.raw()["evaluate"]["keep"].clear()
    assert params.evaluate.keep == params.raw()["evaluate"]["keep"] != []
    assert not hasattr(params, "no_such_parameter")


def test_the_whole_file_is_known_for_tracking():
    params = config.load("report", SHIPPED)
    assert params.labels() == {"encoder": "micro", "vlm": "micro"}
    assert params.whole_file() == config.flat(SHIPPED)
    assert params.flat().items() < params.whole_file().items()


def test_flat_names_every_parameter_once():
    table = config.flat(SHIPPED)
    assert table["seed"] == 0 and table["vlm"] == "micro" and table["pretrain.keep"] == 0.45
    assert len(table) == 5 + sum(len(fields(kind)) for kind in PIPELINE.sections.values())


@pytest.mark.parametrize(
    ("key", "value", "allowed"), [("pretain", {"layers": 3}, "pretrain"), ("sed", 1, "seed")]
)
def test_a_misspelt_section_is_named(check_refused, key, value, allowed):
    check_refused(key, value, allowed)


@pytest.mark.parametrize("value", [None, 3])
def test_what_is_no_section_is_named(check_refused, value):
    check_refused("report", value, "best, pages, examples")


@pytest.mark.parametrize("key", PIPELINE.keys)
def test_a_missing_key_is_named(tmp_path, message, key):
    tree = OmegaConf.load(SHIPPED)
    del tree[key]
    OmegaConf.save(tree, tmp_path / "params.yaml")
    text = message(tmp_path / "params.yaml")
    assert text.startswith(f"{key}: missing") and "params.yaml" in text


def test_a_missing_field_has_its_default(tmp_path):
    tree = OmegaConf.load(SHIPPED)
    del tree.report["pages"]
    OmegaConf.save(tree, tmp_path / "params.yaml")
    assert config.load("report", tmp_path / "params.yaml").report.pages == 3


@dataclass(frozen=True, config=STRICT)
class Top:
    seed: int = 0


@dataclass(frozen=True, config=STRICT)
class Oven:
    degrees: Annotated[int, Field(ge=0, le=300)] = 180


def test_another_file_has_its_own_sections_and_stages(tmp_path):
    (tmp_path / "kitchen.yaml").write_text("seed: 1\noven:\n  degrees: 200\n")
    kitchen = ParameterFile(str(tmp_path / "kitchen.yaml"), Top, {"oven": Oven}, {"bake": ("oven",)})
    params = load("bake", file=kitchen)
    assert params.raw() == {"oven": {"degrees": 200}} and params.labels() == {}
    with pytest.raises(AssertionError, match="stage bake reads seed"):
        _ = params.seed
    (tmp_path / "kitchen.yaml").write_text("seed: 1\noven:\n  degrees: 400\n")
    with pytest.raises(config.ConfigError, match=r"^oven.degrees: 400 is .*: 0 <= degrees <= 300$"):
        load("bake", file=kitchen)


@pytest.mark.parametrize("prompt", ["What is this???", "???!", "Is it 50 $ {or more}?"])
def test_a_prompt_may_look_like_an_interpolation(write, prompt):
    assert config.load("prepare", write(prepare__prompts=[prompt])).prepare.prompts == [prompt]


@pytest.mark.parametrize("prompt", ["???", "${seed}"])
def test_a_prompt_that_omegaconf_would_not_read_as_text_is_named(write, message, prompt):
    path = write()
    path.write_text(path.read_text().replace("- Describe the image in detail.", f"- '{prompt}'"))
    text = message(path)
    assert text.startswith("prepare.prompts: ")
    assert text.endswith(" is not a value, allowed: list[str], written out")


TREE = config.read(SHIPPED)
SECTIONS = {"": PIPELINE.common, **PIPELINE.sections}
INF, NAN = float("inf"), float("nan")
NUMBERS = [0, -1, -(10**30), 10**30, 0.0, -0.5, 1e-300, 1e300, INF, -INF, NAN]
NO_NUMBERS = [True, None, "", "x", "nan", "1e999", [], [[]], {}, {"a": 1}, "0" * 5000]
FIELDS = [
    (section, name, describe_type(hint))
    for section, kind in SECTIONS.items()
    for name, hint in get_type_hints(kind, include_extras=True).items()
]
NUMERIC = [
    (section, name)
    for section, name, kind in FIELDS
    if "int" in kind or "float" in kind or name == "precision"
]


def are_sane(value):
    """Whether it is what a library can count or compute with, or no number at all."""
    if isinstance(value, list):
        return all(map(are_sane, value))
    return not isinstance(value, int | float) or (math.isfinite(value) and abs(value) < 2**32)


def built(section, key, value):
    """The section with one value changed; None where it is refused, after a check of the one line."""
    kind = SECTIONS[section]
    values = TREE[section] if section else {field.name: TREE[field.name] for field in fields(kind)}
    try:
        return build(kind, f"{section}." if section else "", values | {key: value})
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
            # A field of the encoder's layer may be null, and Python takes True for 1.
            assert made is None or type(getattr(made, key)) is not bool, tried


@pytest.mark.parametrize(
    ("section", "key"), [(section, name) for section, name, _ in FIELDS if (section, name) not in NUMERIC]
)
def test_text_that_names_nothing_is_refused_in_one_line_whatever_the_key(section, key):
    free = (section, key) in {("", "encoder"), ("", "vlm"), ("report", "best"), ("prepare", "prompts")}
    empty = key in ("own",)
    for value in ("", "x\0y", "a\nb", "a" * 5000, "../" * 2000, None, [], {}, INF, [None], [{}]):
        made = built(section, key, value)
        assert made is None or free or (empty and value == []), value
