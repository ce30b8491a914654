"""Cost of `from atr import reduce` beside what its user has imported: torch and a model of transformers."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from statistics import median

_CHILD = """
import json, sys, time
start = time.process_time()
import torch
from transformers import LlavaForConditionalGeneration
before, between = set(sys.modules), time.process_time()
from atr import reduce
end = time.process_time()
print(json.dumps([1000 * (end - between), 1000 * (between - start), sorted(set(sys.modules) - before)]))
"""


@dataclass(frozen=True)
class ImportCost:
    """CPU time of an import, that of the imports before it, and the modules that it adds to them."""

    milliseconds: float
    milliseconds_before: float
    modules: list[str]


def import_in_new_process() -> ImportCost:
    """The cost in one new process."""
    compiled = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return ImportCost(*json.loads(subprocess.check_output([sys.executable, "-c", _CHILD], env=compiled)))


def import_cost(processes: int) -> ImportCost:
    """Medians over new processes, after the first has compiled our files as an installation does."""
    _, *costs = [import_in_new_process() for _ in range(1 + processes)]
    own, before = zip(*((cost.milliseconds, cost.milliseconds_before) for cost in costs), strict=True)
    return ImportCost(median(own), median(before), costs[0].modules)


if __name__ == "__main__":
    cost = import_cost(processes=5)
    others = [name for name in cost.modules if name.split(".")[0] != "atr"]
    print(f"import {cost.milliseconds:.0f} ms beside {cost.milliseconds_before:.0f} ms, beyond atr: {others}")
