"""Holds the code to its floors, and the pipeline file to the code."""

import ast
import re
import sys
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from dvc.repo import Repo

from atr import config
from atr.cli.reruns import stages_of_files
from atr.core import catalog
from atr.core.imports import imported_names, reached_files

ROOT = Path(__file__).parents[1]
# The floor of a module is that of the longest name that it begins with. Imports go down, or stay in a room.
FLOORS = {
    "core": 1,
    "config": 2,
    "core.hardware": 3,
    "core.tracking": 3,
    "datasets": 4,
    "features": 4,
    "reduction": 4,
    "benchmarks": 4,
    "reporting": 4,
    "vlm": 5,
    "stages": 6,
    "integrations": 6,
    "micro": 7,
    "cli": 7,
    "__main__": 8,
}
# Who may import a library; the rest of a dotted name that ends in .* is free.
HOMES = {
    "transformers": (
        "atr.features.encoder",
        "atr.features.merged",
        "atr.features.pixel_values",
        "atr.features.query_key_attention",
        "atr.features.vision_half",
        "atr.vlm.*",
        "atr.micro.*",
        "atr.integrations.lmms_eval.*",
    ),
    "lightning": (
        "atr.features.datamodule",
        "atr.features.extraction",
        "atr.reduction.checkpoints",
        "atr.reduction.pretraining",
        "atr.vlm.distillation",
        "atr.micro.*",
        "atr.core.hardware",
        "atr.core.tracking",
        "atr.core.tracking.training_logger",
        "atr.stages.*",
    ),
    "mlflow": ("atr.core.tracking", "atr.core.tracking.*"),
    "lmms_eval": ("atr.integrations.lmms_eval.manifest", "atr.integrations.lmms_eval.model"),
    "onnx": ("atr.features.onnx_weights", "atr.features.wheel_weights"),
    "dvc": ("atr.cli.*",),
}
# What a part must have under the same name as every other part of its kind.
INTERFACES = {
    "main", "build", "examples", "score",
    "BUDGET", "DRAWS", "FAMILY", "GROUP", "INSIDE_LLM", "MERGES", "NEEDS", "ONE_TILE", "SOURCE", "WEIGHTS",
}  # fmt: skip


def dotted(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {dotted(path): path for path in sorted((ROOT / "atr").rglob("*.py"))}


@cache
def parsed(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text())


@cache
def imports(module: str) -> frozenset[str]:
    """Dotted names of what a module imports, at its top, in a function, or for type checking alone."""
    found = set()
    for node in ast.walk(parsed(module)):
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
    """The modules that run when a module does."""
    return {dotted(path) for path in reached_files(MODULES[module], ROOT)}


def room(module: str) -> str:
    """The longest name in FLOORS that the module begins with."""
    name = module.removeprefix("atr.")
    return max((key for key in FLOORS if f"{name}.".startswith(f"{key}.")), key=len)


def goes_down(module: str, imported: str) -> bool:
    """Whether an import stays in its room or goes to a lower floor."""
    upper, lower = room(module), room(imported)
    if upper == lower:
        return True
    if upper == "vlm" and FLOORS[lower] == 4:
        shared = (
            "attention_hooks", "encoder", "merged", "pixel_bounds", "preprocess", "query_key_attention",
            "token_grids",
        )  # fmt: skip
        return lower == "reduction" or imported.removeprefix("atr.features.") in shared
    return FLOORS[lower] < FLOORS[upper]


def test_every_module_has_a_floor():
    assert all(room(module) for module in MODULES if module != "atr")


def test_imports_go_down_only():
    upward = [
        f"{module} -> {imported}"
        for module in MODULES
        for imported in ours(imports(module)) - {"atr"}
        if module != "atr" and not goes_down(module, imported)
    ]
    assert upward == []


def test_no_reader_of_the_main_pipeline_opens_the_small_world():
    outside = {module for module in MODULES if not module.startswith("atr.micro")}
    assert {module for module in outside for name in imports(module) if name.startswith("atr.micro")} == set()


def public_names(module: str) -> Iterator[str]:
    for node in parsed(module).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (target.id for target in targets if isinstance(target, ast.Name))


def test_every_public_name_is_defined_once():
    homes = defaultdict(list)
    for module in MODULES:
        for name in public_names(module):
            if not name.startswith("_") and name not in INTERFACES:
                homes[name].append(module)
    assert {name: modules for name, modules in homes.items() if len(modules) > 1} == {}


@pytest.mark.parametrize("library", HOMES)
def test_a_library_is_imported_where_it_belongs(library):
    homes = re.compile("|".join(re.escape(home).replace(r"\*", r".*") for home in HOMES[library]))
    users = {module for module in MODULES for name in imports(module) if name.split(".")[0] == library}
    assert users, "the test looks for the wrong name"
    assert {module for module in users if not homes.fullmatch(module)} == set()


@pytest.mark.parametrize("light", ["config", "reporting", "datasets", "cli.plan", "cli.overlay"])
def test_a_light_part_reaches_no_torch(light):
    roots = {module for module in MODULES if f"{module}.".startswith(f"atr.{light}.")}
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
    needed = {name.split(".")[0] for part in reached(module) for name in imported_names(MODULES[part])}
    assert needed - sys.stdlib_module_names - {"atr"} <= library


def test_importing_the_package_alone_imports_nothing():
    assert {name.split(".")[0] for name in imported_names(MODULES["atr"])} <= {"importlib", "typing"}


@pytest.fixture(scope="module")
def pipeline():
    """The stages that DVC makes of dvc.yaml and params.yaml, each with its resolved dependencies."""
    with Repo(str(ROOT)) as repo:
        yield list(repo.index.stages)


def module_of(stage) -> str:
    return re.search(r"python -m (atr[.\w]*)", stage.cmd).group(1)


def code_deps(stage) -> set[str]:
    paths = {Path(dep.fs_path).relative_to(ROOT).as_posix() for dep in stage.deps}
    return {path for path in paths if path.startswith("atr/")}


def params_of(stage) -> set[str]:
    return {name for dep in stage.deps for name in getattr(dep, "params", ())}


def files(paths) -> set[str]:
    return {path.relative_to(ROOT).as_posix() for path in paths}


def run_by(stage) -> frozenset[str]:
    """Files that a stage runs: its module, what this imports, and the sections of params.yaml it is given."""
    return reached_by(module_of(stage), frozenset(name.partition(".")[0] for name in params_of(stage)))


@cache
def reached_by(module: str, given: frozenset[str]) -> frozenset[str]:
    sections = [path for name in given if (path := ROOT / f"atr/config/{name}.py").is_file()]
    found = set().union(*(reached_files(path, ROOT) for path in (MODULES[module], *sections)))
    return frozenset(files(found))


@cache
def benchmark_helpers() -> frozenset[Path]:
    """Files that benchmarks run and that are no benchmarks."""
    ours = {ROOT / f"atr/benchmarks/{name}.py" for name in catalog.benchmarks()}
    return frozenset(file for path in ours for file in reached_files(path, ROOT) - ours)


def looked_up_by(stage) -> set[str]:
    """Files that a stage may load by a name: presets, families, its reducer, drawn images, the page."""
    presets = (ROOT / "atr/config/presets").rglob("*.yaml")
    families = [reached_files(path, ROOT) for path in (ROOT / "atr/vlm/families").glob("*.py")]
    world = reached_files(ROOT / "atr/micro/world.py", ROOT) if stage.name == "prepare" else set()
    part = re.search(r"(?<=@)\w+$", stage.name)
    folders = ("benchmarks", "reduction/peers", "reduction/trained")
    parts = {ROOT / f"atr/{folder}/{part.group()}.py" for folder in folders} if part else set()
    parts.add(ROOT / "atr/reduction/peers/__init__.py")
    parts |= benchmark_helpers() if stage.name.startswith("benchmark@") else set()
    parts |= set((ROOT / "atr/reporting").glob("*.jinja")) if stage.name == "report" else set()
    return files(set(presets) | set().union(*families) | world | parts)


def test_every_stage_module_is_run_and_has_declared_parameters(pipeline):
    modules = {module for module in MODULES if module.startswith("atr.stages.")}
    own = {f"atr.stages.{name}" for name in config.STAGES}
    assert modules == {module_of(stage) for stage in pipeline} == own


def test_every_stage_of_the_small_world_is_run_by_make():
    recipes = (ROOT / "Makefile").read_text()
    by_hand = set(re.findall(r"^\tpython -m (atr\.micro\.stages\.\w+)", recipes, flags=re.MULTILINE))
    assert by_hand == {module for module in MODULES if module.startswith("atr.micro.stages.")}


def test_a_stage_declares_to_dvc_the_parameters_it_is_given(pipeline):
    for stage in pipeline:
        assert params_of(stage) == set(config.STAGES[module_of(stage).rpartition(".")[2]]), stage.name


def test_dvc_compares_by_nothing_but_a_few_flat_numbers(pipeline):
    """A list is invisible to it, and a table of hundreds of columns to a person."""
    metrics = {Path(out.fs_path).name for stage in pipeline for out in stage.outs if out.metric}
    assert metrics == {"text.json", "general.json"}


def test_a_stage_depends_on_the_code_it_runs(pipeline):
    missing = {
        f"{stage.name}: {file}"
        for stage in pipeline
        for file in run_by(stage)
        if not any(f"{file}/".startswith(f"{dep}/") for dep in code_deps(stage))
    }
    assert missing == set()


def test_a_stage_depends_on_no_code_that_it_does_not_run(pipeline):
    """A superfluous dependency runs a stage again for nothing."""
    superfluous = {
        f"{stage.name}: {file}"
        for stage in pipeline
        for file in code_deps(stage) - run_by(stage) - looked_up_by(stage)
    }
    assert superfluous == set()


def test_a_benchmark_depends_on_all_that_any_of_ours_runs(pipeline):
    """So that its digest is computed again, on which the stages that score by it depend."""
    (cell,) = [stage for stage in pipeline if stage.name == "benchmark@docs"]
    assert files(benchmark_helpers()) <= code_deps(cell)


def test_every_preset_is_a_dependency_of_stage_models(pipeline):
    (models,) = [stage for stage in pipeline if stage.name == "models"]
    assert files((ROOT / "atr/config/presets").rglob("*.yaml")) <= code_deps(models)


def test_times_of_a_machine_are_not_in_git(pipeline):
    """A clone would take those of another machine for cells that did not change, beside its own."""
    timed = [out for stage in pipeline if re.match("latency|prefill", stage.name) for out in stage.outs]
    assert timed and all(out.use_cache for out in timed)


PARTS = {
    "atr/reduction/peers/random.py": {
        "evaluate@random", "intrinsic@random", "latency@random", "robustness@random",
    },
    "atr/reduction/trained/distilled.py": {
        "evaluate-distilled@distilled", "intrinsic-distilled@distilled",
        "latency-distilled@distilled", "robustness-distilled@distilled",
    },
    "atr/reduction/peers/visionzip.py": set(),
    "atr/benchmarks/charts.py": {"benchmark@charts"},
    "atr/config/presets/encoders/dinov2-base.yaml": {"models"},
    "atr/benchmarks/gqa.py": set(),
    "atr/config/report.py": {"report"},
    "atr/micro/model.py": set(),
    "atr/micro/training.py": set(),
    "atr/micro/params.py": set(),
    "atr/integrations/lmms_eval/model.py": set(),
    "atr/cli/plan.py": set(),
}  # fmt: skip


@pytest.mark.parametrize("file", PARTS)
def test_a_change_reruns_what_runs_it_and_nothing_else(pipeline, file):
    assert (ROOT / file).is_file()
    users = stages_of_files(pipeline, ROOT)
    assert {
        stage for dep, stages in users.items() if f"{file}/".startswith(f"{dep}/") for stage in stages
    } == (PARTS[file])


@pytest.mark.parametrize(
    "file",
    [
        "atr/reduction/peers/new.py", "atr/reduction/trained/new.py", "atr/benchmarks/new.py",
        "atr/vlm/families/new.py", "atr/config/presets/encoders/new.yaml", "atr/config/presets/vlms/new.yaml",
        "atr/micro/new.py", "atr/stages/new.py", "atr/reporting/new.py",
    ],
)  # fmt: skip
def test_a_new_file_that_no_parameter_names_reruns_nothing(pipeline, file):
    users = stages_of_files(pipeline, ROOT)
    assert [dep for dep in users if f"{file}/".startswith(f"{dep}/")] == []


def test_the_lazy_exports_are_the_things_themselves():
    import atr
    from atr.reduction.selector import FeatureSelector
    from atr.vlm.boxes import token_boxes
    from atr.vlm.input_checks import check_inputs
    from atr.vlm.reduce import reduce

    assert atr.FeatureSelector is FeatureSelector
    assert atr.check_inputs is check_inputs
    assert atr.reduce is reduce
    assert atr.token_boxes is token_boxes
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = atr.no_such_name
