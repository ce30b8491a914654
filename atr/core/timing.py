"""How long something takes, and on what."""

import platform
from collections.abc import Callable

import torch
from torch.utils.benchmark import Timer


def milliseconds(run: Callable[[], object], seconds: float) -> float:
    """Median time of a call, repeated for `seconds` at least; what is left to do on a GPU is waited for."""
    # The timer would take one thread where nothing else is said.
    timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    return 1000 * timer.blocked_autorange(min_run_time=seconds).median


def device_name(device: torch.device) -> str:
    """What a reader of the times needs to know of a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        instructions = torch.backends.cpu.get_cpu_capability()
        return f"{platform.machine()} CPU, {instructions}, {torch.get_num_threads()} threads"
    return str(device)
