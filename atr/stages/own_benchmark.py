"""DVC stage own_benchmark: the digest of the file of one of the user's own benchmarks.

Its cell in the matrix depends on the file; stages that read several benchmarks depend on the digests, as DVC
allows no list of files from params.yaml as dependencies of one stage.
"""

from argparse import ArgumentParser
from functools import partial
from pathlib import Path

from atr import config
from atr.core.files import sha256, write_json
from atr.stages import entry

OWN = Path("data/own")


def main(params: config.Params, name: str) -> None:
    """Check a benchmark's file and write its digest to data/own/<name>.json.

    The name is the path of the file without `.py`. Raises ValueError naming the file if it is missing or no
    benchmark.
    """
    from atr.benchmarks import benchmark_file, load_benchmark

    benchmark, path = load_benchmark(name), benchmark_file(name)
    content = {"file": f"{name}.py", "sha256": sha256(path), "group": benchmark.group}
    write_json(OWN / f"{name}.json", content)


if __name__ == "__main__":
    parser = ArgumentParser(prog="atr.stages.own_benchmark", description=__doc__)
    parser.add_argument("name", help="path of the benchmark's file, without .py")
    entry("own_benchmark", partial(main, name=parser.parse_args().name))
