import re
from pathlib import Path

import pytest

from atr import config

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "params.yaml"


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
def test_a_file_that_is_no_mapping_is_named(tmp_path, message, content):
    path = tmp_path / "params.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert "params.yaml" in message(path)


def test_a_missing_file_and_a_folder_in_its_place_are_named(tmp_path, message):
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
        ("evaluate.newline", "yes"),
        ("trainer.devices", "[010]"),
    ],
)
def test_what_two_versions_of_yaml_read_differently_is_refused_by_name(tmp_path, message, key, text):
    section, _, name = key.rpartition(".")
    head, found, tail = SHIPPED.read_text().partition(f"\n{section}:" if section else "\n")
    path = tmp_path / "params.yaml"
    path.write_text(head + found + re.sub(rf"\b{name}: .*", f"{name}: {text}", tail, count=1))
    refused = rf"{key}: .* in YAML 1.2, which DVC reads, is .* in YAML 1.1, allowed: "
    assert re.match(refused, message(path))


@pytest.mark.parametrize("text", ["1_000", "1e3", "0x3e8", "'1000'", "+1000"])
def test_a_stage_reads_a_number_as_dvc_does(tmp_path, message, text):
    from dvc.utils.serialize import load_yaml

    path = tmp_path / "params.yaml"
    path.write_text(SHIPPED.read_text().replace("images: 5120", f"images: {text}", 1))
    recorded = load_yaml(str(path))["prepare"]["images"]
    if isinstance(recorded, float):
        assert message(path).startswith("prepare.images: 1000.0 has a wrong type")
    else:
        assert config.load("prepare", path).prepare.images == int(recorded) == 1000


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
