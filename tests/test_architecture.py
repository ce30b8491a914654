"""Holds the code to its floors, and the pipeline file to the code."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from atr import config

ROOT = Path(__file__).parents[1]
FLOORS = {
    "__main__": 5,
    "stages": 4,
    "lmms_eval": 4,
    "vlm": 3,
    "datasets": 2,
    "features": 2,
    "reduction": 2,
    "benchmarks": 2,
    "reporting": 2,
    "overlay": 2,
    "plan": 2,
    "bootstrap": 1,
    "config": 1,
    "disk": 1,
    "files": 1,
    "finite": 1,
    "fingerprint": 1,
    "hardware": 1,
    "hub": 1,
    "records": 1,
    "lifetime": 0,
    "timing": 1,
    "tokens": 1,
    "tracking": 1,
}
# Who may import a library; the rest of a dotted name that ends in .* is free.
HOMES = {
    "transformers": ("atr.features.encoder", "atr.vlm.*", "atr.integrations.lmms_eval.reduced_vlm"),
    "lightning": (
        "atr.features.datamodule",
        "atr.features.extraction",
        "atr.reduction.checkpoints",
        "atr.reduction.pretraining",
        "atr.vlm.distillation",
        "atr.micro.curriculum",
        "atr.micro.training",
        "atr.core.tracking",
        "atr.core.tracking.training_logger",
        "atr.stages.*",
    ),
    "mlflow": ("atr.core.tracking", "atr.core.tracking.*"),
    "lmms_eval": ("atr.integrations.lmms_eval.manifest", "atr.integrations.lmms_eval.model"),
    "onnx": ("atr.features.onnx_weights", "atr.features.wheel_weights"),
}


def dotted(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {dotted(path): path for path in sorted((ROOT / "atr").rglob("*.py"))}


def nodes(tree: ast.AST, executed: bool) -> Iterator[ast.AST]:
    """All nodes; where only executed code counts, without what stands under `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if not (executed and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            yield node
            yield from nodes(node, executed)


@cache
def parsed(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text())


@cache
def imports(module: str, executed: bool = False) -> frozenset[str]:
    """Dotted names of what a module imports, at its top or inside a function."""
    found = set()
    for node in nodes(parsed(module), executed):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are written in full"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else str(node.module) for name in names}
    return frozenset(found)


def ours(names: frozenset[str]) -> set[str]:
    unknown = {name for name in names if name.split(".")[0] == "atr" and name not in MODULES}
    assert not unknown, f"no such module: {unknown}"
    return {name for name in names if name in MODULES}


def reached(module: str) -> set[str]:
    """The modules that run when a module does: itself, what it imports, and the packages these lie in."""
    found, todo = set(), {module}
    while todo:
        name = todo.pop()
        found.add(name)
        packages = {name.rpartition(".")[0]} - {""}
        todo |= (ours(imports(name, executed=True)) | packages) - found
    return found


def part(module: str) -> str:
    return module.split(".")[1]


def goes_down(module: str, imported: str) -> bool:
    """Whether an import stays in its part or goes to a lower floor, as atr/'s architecture has it."""
    upper, lower = part(module), part(imported)
    if upper == lower or (upper, lower) in {("tracking", "config"), ("hardware", "config"), ("hub", "files")}:
        return True
    if upper == "vlm" and FLOORS[lower] == 2:
        shared = ("atr.features.attention_hooks", "atr.features.encoder", "atr.features.preprocess")
        return lower == "reduction" or imported in shared
    return FLOORS[lower] < FLOORS[upper]


def test_every_part_has_a_floor():
    assert {part(module) for module in MODULES if module != "atr"} == set(FLOORS)


def test_imports_go_down_only():
    upward = [
        f"{module} -> {imported}"
        for module in MODULES
        for imported in ours(imports(module)) - {"atr"}
        if module != "atr" and not goes_down(module, imported)
    ]
    assert upward == []


@pytest.mark.parametrize("library", HOMES)
def test_a_library_is_imported_where_it_belongs(library):
    homes = re.compile("|".join(re.escape(home).replace(r"\*", r".*") for home in HOMES[library]))
    users = {module for module in MODULES for name in imports(module) if name.split(".")[0] == library}
    assert users, "the test looks for the wrong name"
    assert {module for module in users if not homes.fullmatch(module)} == set()


@pytest.mark.parametrize("light", ["reporting", "datasets", "plan", "overlay", "__main__"])
def test_a_light_part_reaches_no_torch(light):
    roots = {module for module in MODULES if module != "atr" and part(module) == light}
    modules = set().union(*(reached(module) for module in roots))
    heavy = {"torch", "torchmetrics", "transformers", "lightning", "mlflow"}
    assert {module for module in modules for name in imports(module) if name.split(".")[0] in heavy} == set()


@pytest.mark.parametrize(
    "module",
    [
        "atr.vlm.reduce",
        "atr.vlm.input_checks",
        "atr.reduction.selector",
        "atr.integrations.lmms_eval.reduced_vlm",
    ],
)
def test_the_library_needs_no_package_of_the_pipeline(module):
    """It is installed beside lmms-eval, and beside a user's own model, without them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    packages = {re.match(r"[\w-]+", line).group() for line in project["dependencies"]}
    library = packages - {"pillow"} | {"PIL"}
    needed = {name.split(".")[0] for part in reached(module) for name in imports(part, executed=True)}
    assert needed - sys.stdlib_module_names - {"atr"} <= library


def test_importing_the_package_alone_imports_nothing():
    assert imports("atr", executed=True) <= {"importlib", "typing"}


PIPELINE = ROOT / "dvc.yaml"


@dataclass(frozen=True)
class Stage:
    """A stage of the pipeline file that runs a module of ours."""

    name: str
    module: str
    params: frozenset[str]
    deps: frozenset[Path]


def stages() -> list[Stage]:
    found = []
    tree: Any = OmegaConf.to_container(OmegaConf.load(PIPELINE), resolve=False)
    for name, stage in tree["stages"].items():
        deps = frozenset(ROOT / dep for dep in stage.get("deps", []))
        for module in re.findall(r"python -m (atr[.\w]*)", stage["cmd"]):
            found.append(Stage(name, module, frozenset(stage.get("params", [])), deps))
    return found


def fields_of(keys: Iterable[str]) -> set[str]:
    """Dotted names of all parameters that the keys stand for, a section for all of its fields."""
    found = set()
    for key in keys:
        section = config._SECTIONS.get(key)
        found |= {f"{key}.{field.name}" for field in fields(section)} if section else {key}
    return found


def test_every_stage_module_is_run_and_has_declared_parameters():
    modules = {module for module in MODULES if module.startswith("atr.stages.")}
    recipes = (ROOT / "Makefile").read_text()
    by_hand = set(re.findall(r"^\tpython -m (atr\.stages\.\w+)", recipes, flags=re.MULTILINE))
    assert modules == {stage.module for stage in stages()} | by_hand
    assert modules == {f"atr.stages.{name}" for name in config.STAGES}
    assert not by_hand & {stage.module for stage in stages()}


def test_a_stage_declares_to_dvc_the_parameters_it_is_given():
    # What a matrix is made of makes cells, and must not run the others again when one is added: it is a
    # parameter only of the stages that read it.
    templates = set(re.findall(r"\$\{([\w.]+)\}", PIPELINE.read_text()))
    for stage in stages():
        given = fields_of(config.STAGES[stage.module.rpartition(".")[2]])
        read = {node.attr for node in ast.walk(parsed(stage.module)) if isinstance(node, ast.Attribute)}
        if read & {"names", "budgeted"}:  # properties of evaluate that are made of three fields
            read |= {"reducers", "selectors", "distilled"}
        unread = {template for template in templates if template.rpartition(".")[2] not in read}
        assert fields_of(stage.params) == given - unread, stage.name


def test_dvc_compares_by_nothing_but_a_few_flat_numbers():
    """A list is invisible to it, and a table of hundreds of columns to a person."""
    tree: Any = OmegaConf.to_container(OmegaConf.load(ROOT / "dvc.yaml"), resolve=False)
    metrics = {
        path for stage in tree["stages"].values() for each in stage.get("metrics", []) for path in each
    }
    assert metrics == {f"experiments/report/{group}.json" for group in set(config.GROUPS.values())}


def test_a_stage_depends_on_the_code_it_runs():
    missing = [
        f"{stage.name}: {MODULES[module].relative_to(ROOT)}"
        for stage in stages()
        for module in sorted(reached(stage.module))
        if not any(MODULES[module].is_relative_to(dep) for dep in stage.deps)
    ]
    assert missing == []


def test_a_stage_depends_on_no_code_that_it_does_not_run():
    """A superfluous dependency runs a stage again for nothing."""
    superfluous = [
        f"{stage.name}: {dep.relative_to(ROOT)}"
        for stage in stages()
        for dep in sorted(stage.deps)
        if dep.is_relative_to(ROOT / "atr")
        and not any(MODULES[module].is_relative_to(dep) for module in reached(stage.module))
    ]
    assert superfluous == []


def test_the_names_in_config_are_those_of_the_registries():
    from atr.benchmarks import BENCHMARKS
    from atr.reduction import REDUCERS
    from atr.vlm.in_llm import INSIDE
    from atr.vlm.policy import CHOICES

    assert {key: set(values) for key, values in config.LAYOUT.items()} == {
        key: set(values) for key, values in CHOICES.items()
    }
    assert sorted((*config.REDUCERS, *config.SELECTORS, *config.DISTILLED)) == sorted((*REDUCERS, *INSIDE))
    assert {name: benchmark.group for name, benchmark in BENCHMARKS.items()} == config.GROUPS


def test_the_reducers_of_one_tile_in_config_are_those_that_refuse_several(tmp_path):
    from atr.reduction import REDUCERS, FeatureSelector
    from atr.vlm.policy import needs_one_tile

    FeatureSelector(width=4, grid=(2, 2), layers=1, heads=1).save_pretrained(tmp_path)
    refusing = {name for name, make in REDUCERS.items() if needs_one_tile(make(0, tmp_path))}
    assert sorted(config.ONE_TILE) == sorted(refusing)


def test_the_lazy_exports_are_the_things_themselves():
    import atr
    from atr.reduction.selector import FeatureSelector
    from atr.vlm.input_checks import check_inputs
    from atr.vlm.reduce import reduce

    assert atr.FeatureSelector is FeatureSelector
    assert atr.check_inputs is check_inputs
    assert atr.reduce is reduce
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = atr.no_such_name
