"""What an import of the library costs beside torch and a model of transformers: the modules that it adds."""

import runpy
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_library_imports_nothing_that_its_user_has_not_imported():
    """Modules tell more than milliseconds: pandas or lightning alone would cost more than all of ours."""
    cost = runpy.run_path(str(ROOT / "benchmarks/imports.py"))["import_in_new_process"]()
    assert {"atr", "atr.vlm.reduce"} < set(cost.modules)
    assert [name for name in cost.modules if name.split(".")[0] != "atr"] == ["huggingface_hub.hub_mixin"]
    assert 0 < cost.milliseconds < cost.milliseconds_before
