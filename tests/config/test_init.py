import ast
import re
import sys
from pathlib import Path
from subprocess import run

import pytest

from atr import config

ROOT = Path(__file__).parents[2]


def test_sections_presets_and_stages_are_looked_up_by_name():
    from atr.config.evaluate import Evaluate
    from atr.config.presets import VLMS
    from atr.config.selector_training import SelectorTraining
    from atr.config.stages import STAGES

    assert config.Evaluate is Evaluate and config.SelectorTraining is SelectorTraining
    assert config.VLMS is VLMS and config.STAGES is STAGES
    with pytest.raises(AttributeError, match=r"'atr\.config' has no attribute 'Nothing'"):
        _ = config.Nothing
    with pytest.raises(AttributeError, match="_private"):
        _ = config._private


def test_importing_the_package_imports_no_section():
    script = (
        "import sys; from atr import config; print(*(n for n in sys.modules if n.startswith('atr.config.')))"
    )
    done = run([sys.executable, "-c", script], env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert set(done.stdout.split()) == {f"atr.config.{name}" for name in ("errors", "loader", "reading")}


def test_modules_import_a_section_from_its_own_file():
    """A name looked up in `atr.config` is an import that the pipeline's dependencies do not show."""
    for path in sorted((ROOT / "atr").rglob("*.py")):
        tree = ast.parse(path.read_text())
        imported = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        if any(re.fullmatch(r"from atr import (.*, )?config(, .*)?", line) for line in imported):
            attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
            used = {node.attr for node in attributes if ast.unparse(node.value) == "config"}
            assert used <= set(config.__all__), path
