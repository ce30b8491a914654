"""Wall-clock timing of a call, and the name of the device it ran on."""

import platform
from collections.abc import Callable

import torch
from torch.utils.benchmark import Timer


def milliseconds(run: Callable[[], object], seconds: float) -> float:
    """Median time of a call, repeated for at least `seconds`; synchronises with a GPU before it stops."""
    # Timer uses one thread by default.
    timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    return 1000 * timer.blocked_autorange(min_run_time=seconds).median


def device_name(device: torch.device) -> str:
    """Model of a GPU; architecture, instruction set and thread count of a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        instructions = torch.backends.cpu.get_cpu_capability()
        return f"{platform.machine()} CPU, {instructions}, {torch.get_num_threads()} threads"
    return str(device)
