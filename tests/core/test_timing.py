import time
from functools import partial
from itertools import cycle

import pytest
import torch
from torch.utils.benchmark import Timer

from atr.core import timing
from atr.core.timing import device_name, milliseconds


def test_the_time_of_a_sleep_is_right():
    calls = []

    def pause():
        calls.append(torch.get_num_threads())
        time.sleep(0.02)

    assert 20 <= milliseconds(pause, 0.1) < 200
    assert len(calls) >= 5 and set(calls) == {torch.get_num_threads()}


@pytest.mark.parametrize("durations", [(0.02,), (0.02, 0.02, 0.7)])
def test_the_time_is_the_median_in_milliseconds(monkeypatch, durations):
    """With a fake clock that advances only while the timed call runs."""
    now, left = [100.0], cycle(durations)

    def run():
        now[0] += next(left)

    monkeypatch.setattr(timing, "Timer", partial(Timer, timer=lambda: now[0]))
    assert milliseconds(run, 6.0) == pytest.approx(20)
    assert now[0] >= 106.0


def test_a_cpu_is_named_with_its_instructions_and_threads():
    name = device_name(torch.device("cpu"))
    assert f"{torch.get_num_threads()} threads" in name and torch.backends.cpu.get_cpu_capability() in name
