"""Two sides timed in turns, so that both meet the same load of the machine."""

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import NamedTuple


class Seconds(NamedTuple):
    """Wall-clock time, and CPU time of all threads."""

    wall: float
    cpu: float

    def per_unit(self, smaller: "Seconds", units: float) -> "Seconds":
        """Time of each of the `units` that a run did more than a `smaller` one."""
        return Seconds((self.wall - smaller.wall) / units, (self.cpu - smaller.cpu) / units)


def time_call(call: Callable[[], object]) -> Seconds:
    """Seconds of a call in this process."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu)


def alternate(sides: Sequence[Callable[[], Seconds]], rounds: int) -> list[list[Seconds]]:
    """The measurements of each side, one of each in every round."""
    measured: list[list[Seconds]] = [[] for _ in sides]
    for _ in range(rounds):
        for side, seconds in zip(sides, measured, strict=True):
            seconds.append(side())
    return measured


def ratio_text(over: Sequence[Seconds], under: Sequence[Seconds]) -> str:
    """Medians of the rounds' ratios, of wall and of CPU times, each with its spread."""
    walls, cpus = ([a[kind] / b[kind] for a, b in zip(over, under, strict=True)] for kind in (0, 1))
    return f"{_spread(walls)}; CPU time {_spread(cpus)}"


def _spread(ratios: Sequence[float]) -> str:
    return f"{median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
