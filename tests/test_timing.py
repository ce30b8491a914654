import time

import torch

from atr.timing import device_name, milliseconds


def test_a_pause_takes_as_long_as_it_does():
    calls = []

    def pause():
        calls.append(torch.get_num_threads())
        time.sleep(0.02)

    assert 20 <= milliseconds(pause, 0.1) < 200
    assert len(calls) >= 5 and set(calls) == {torch.get_num_threads()}


def test_a_cpu_is_named_with_its_instructions_and_threads():
    name = device_name(torch.device("cpu"))
    assert f"{torch.get_num_threads()} threads" in name and torch.backends.cpu.get_cpu_capability() in name
