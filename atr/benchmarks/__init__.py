"""Benchmarks: each is a file with GROUP, SOURCE, examples() and score(), found by its name.

The other modules of this folder have no GROUP: base, metrics and vqa serve the benchmarks; runner and
summary evaluate with them.
"""

import sys
from functools import cache
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from atr.benchmarks.base import Benchmark, DrawingModule, HubDataset
from atr.core import catalog

__all__ = ["Benchmark", "DrawingModule", "HubDataset", "load_benchmark"]

_CONTRACT = {"examples": "a function of rows", "score": "a function of a prediction and a question"}


@cache
def load_benchmark(name: str) -> Benchmark:
    """Import one benchmark: ours by its file's name, the user's own by the path of its file without `.py`.

    Raises ValueError naming the file if it is missing, fails to import or lacks GROUP, SOURCE, examples() or
    score().
    """
    path = benchmark_file(name)
    group = catalog.benchmark_group(name)
    module = _import_file(name, path)
    source = getattr(module, "SOURCE", None)
    if not isinstance(source, HubDataset | DrawingModule):
        raise ValueError(
            f"{path}: SOURCE: {source!r} is not allowed, allowed: a HubDataset or a DrawingModule"
        )
    for function, what in _CONTRACT.items():
        if not callable(getattr(module, function, None)):
            raise ValueError(f"{path} has no {function}(), allowed: {what}")
    return Benchmark(name, group, source, module.examples, module.score)


def benchmark_file(name: str) -> Path:
    """The file of a benchmark, of ours or of the user's own; it may be missing."""
    ours = catalog.BENCHMARKS / f"{name}.py"
    return ours if ours.is_file() else Path(f"{name}.py")


def _import_file(name: str, path: Path) -> ModuleType:
    if path.parent == catalog.BENCHMARKS:
        return import_module(f"{__name__}.{name}")
    spec = spec_from_file_location(f"own_benchmark.{'.'.join(Path(name).parts)}", path)
    assert spec and spec.loader, "a path that ends in .py has a loader"
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[spec.name]
        raise ValueError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    return module
