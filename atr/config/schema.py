"""JSON schema of params.yaml for editors: `python -m atr.config.schema > atr/config/params.schema.json`."""

import ast
import inspect
import json
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from atr.config.loader import ParameterFile
from atr.config.stages import PIPELINE

PATH = Path(__file__).with_name("params.schema.json")


def schema(file: ParameterFile) -> dict[str, Any]:
    """The schema of a parameter file; fields have their types, ranges, defaults and docstrings."""
    sections = {name: _object(kind) for name, kind in file.sections.items()}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": file.path,
        "type": "object",
        "properties": {**_object(file.common)["properties"], **sections},
        "required": list(file.keys),
        "additionalProperties": False,
    }


def _object(kind: type) -> dict[str, Any]:
    tree = TypeAdapter(kind).json_schema()
    docstrings: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        docstrings |= field_docstrings(base)
    for name, field in tree["properties"].items():
        del field["title"]
        field["description"] = docstrings[name]
    return {
        "description": inspect.cleandoc(kind.__doc__ or ""),
        "type": "object",
        "properties": tree["properties"],
        "additionalProperties": False,
    }


def field_docstrings(kind: type) -> dict[str, str]:
    """The docstrings under the fields of a class, each as one line."""
    (node,) = ast.parse(inspect.getsource(kind)).body
    assert isinstance(node, ast.ClassDef)
    docstrings = {}
    for field, text in zip(node.body, node.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
            docstrings[ast.unparse(field.target)] = " ".join(str(ast.literal_eval(text.value)).split())
    return docstrings


if __name__ == "__main__":
    print(json.dumps(schema(PIPELINE), indent=2))
