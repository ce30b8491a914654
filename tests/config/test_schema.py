import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

from atr.config.schema import PATH, field_docstrings, schema
from atr.config.selector_training import SelectorTraining
from atr.config.stages import PIPELINE

ROOT = Path(__file__).parents[2]


def test_the_shipped_schema_is_that_of_the_code():
    command = [sys.executable, "-m", "atr.config.schema"]
    done = subprocess.run(
        command, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True
    )
    assert PATH.read_text() == done.stdout, "python -m atr.config.schema > atr/config/params.schema.json"


def test_editors_find_the_schema():
    line = (ROOT / "params.yaml").read_text().partition("\n")[0]
    assert line == f"# yaml-language-server: $schema={PATH.relative_to(ROOT)}"


def test_every_field_has_a_description():
    properties = schema(PIPELINE)["properties"]
    assert list(properties) == list(PIPELINE.keys)
    for name, kind in PIPELINE.sections.items():
        described = properties[name]["properties"]
        assert list(described) == [field.name for field in fields(kind)]
        assert all(field["description"] for field in described.values())


def test_ranges_choices_and_defaults_are_in_the_schema():
    pretrain = schema(PIPELINE)["properties"]["pretrain"]
    assert not pretrain["additionalProperties"]
    keep, position = pretrain["properties"]["keep"], pretrain["properties"]["position"]
    assert (keep["exclusiveMinimum"], keep["exclusiveMaximum"], keep["default"]) == (0, 1, 0.45)
    assert position["enum"] == ["none", "sine"]
    temperature = pretrain["properties"]["temperature"]
    assert (temperature["minimum"], temperature["maximum"]) == (0.01, 100)
    assert json.loads(json.dumps(pretrain)) == pretrain


def test_a_docstring_is_one_line():
    assert field_docstrings(SelectorTraining)["batch_size"].endswith("more steps beat larger batches.")
