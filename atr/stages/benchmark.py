"""Stage benchmark: a small file for each benchmark, which changes when the code of its questions or scores does.

The stages that draw questions and score answers depend on these files, and not on the code of benchmarks that
params.yaml does not name.
"""

from argparse import ArgumentParser
from functools import partial

from atr import config
from atr.core import imports
from atr.core.files import sha256, write_json
from atr.stages import BENCHMARKS, entry


def main(params: config.Params, benchmark: str) -> None:
    """Check one benchmark, ours by name or your own file without .py; write its group and its code's digests."""
    from atr.benchmarks import load_benchmark
    from atr.core import catalog

    loaded = load_benchmark(benchmark)
    file, root = catalog.benchmark_file(benchmark).resolve(), catalog.PACKAGE.parent
    reached = [path for path in imports.reached_files(file) if "benchmarks" in path.parts or path == file]
    code = {path.relative_to(root).as_posix(): sha256(path) for path in sorted(reached)}
    write_json(BENCHMARKS / f"{benchmark}.json", {"group": loaded.group, "code": code})


if __name__ == "__main__":
    parser = ArgumentParser(prog="atr.stages.benchmark", description=__doc__)
    parser.add_argument("benchmark", help="a benchmark of ours, or your own file without .py")
    entry("benchmark", partial(main, benchmark=parser.parse_args().benchmark))
