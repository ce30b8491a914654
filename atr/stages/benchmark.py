"""Stage benchmark: writes a small file per benchmark that changes when the benchmark's code does.

The stages that draw questions and score answers depend on these files, so that a change to a benchmark that
params.yaml does not name reruns nothing.
"""

from argparse import ArgumentParser
from functools import partial
from pathlib import Path

from atr import config
from atr.core import catalog, imports
from atr.core.files import digest, sha256, write_json
from atr.stages import BENCHMARK_FILES, entry


def main(params: config.Params, benchmark: str) -> None:
    """Check one benchmark, built-in or your own; write its group and the digest of its code."""
    from atr.benchmarks import benchmark_file, load_benchmark

    group, file = load_benchmark(benchmark).group, benchmark_file(benchmark)
    root = imports.ROOT if file.is_relative_to(catalog.BENCHMARKS) else Path.cwd()
    files = imports.reached_files(file, root)
    code = digest(files=[sha256(path) for path in sorted(files)])
    write_json(BENCHMARK_FILES / f"{benchmark}.json", {"group": group, "code": code})


if __name__ == "__main__":
    parser = ArgumentParser(prog="atr.stages.benchmark", description=__doc__)
    parser.add_argument("benchmark", help="a built-in benchmark, or the path of your own file without .py")
    entry("benchmark", partial(main, benchmark=parser.parse_args().benchmark))
