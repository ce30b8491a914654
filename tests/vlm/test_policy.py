import numpy as np
import pytest
import torch

from atr.vlm.policy import Policy


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ({"keep": "all"}, "keep: 'all' is unknown, allowed: a fraction, a count, adaptive"),
        ({"keep": 1.5}, "keep: 1.5 is out of range"),
        ({"keep": -5}, "keep: -5 is out of range, allowed: a fraction 0 <= keep <= 1, or an int >= 0"),
        ({"keep": np.float32(1.5)}, "keep: 1.5 is out of range"),
        ({"keep": True}, "keep: True is out of range"),
        ({"keep": float("nan")}, "keep: nan is out of range"),
        ({"keep": torch.tensor([0.5, 0.5])}, r"keep: tensor\(.* is out of range"),
        ({"keep": None}, "keep: None is out of range"),
        ({"keep": "adaptive", "bounds": (0.8, 0.2)}, r"bounds: \(0.8, 0.2\) is .* the lower first"),
        ({"keep": "adaptive", "bounds": (np.int64(9), 3)}, r"bounds: \(9, 3\) is .* the lower first"),
        ({"keep": "adaptive", "bounds": (0.1, float("inf"))}, "bounds: inf is out of range"),
        ({"keep": "adaptive", "bounds": (0, True)}, "bounds: True is out of range"),
        ({"keep": "adaptive", "bounds": (0.1, 0.5, 0.9)}, "bounds: .* two fractions or counts"),
        ({"keep": "adaptive", "bounds": 5}, "bounds: 5 is not allowed, allowed: two fractions or counts"),
        ({"keep": 0.5, "bounds": (0.1, 0.5)}, r"bounds: .* is not allowed with keep 0.5"),
        ({"keep": "adaptive", "bounds": (0.1, 1.5)}, r"bounds: \(0.1, 1.5\) is out of range"),
        ({"keep": "adaptive", "bounds": (-1, 5)}, r"bounds: \(-1, 5\) is out of range"),
        ({"keep": 0.5, "positions": "gappy"}, "positions: 'gappy' .* original, contiguous"),
        ({"keep": 0.5, "budget": "row"}, "budget: 'row' is unknown, allowed: image, tile"),
        ({"keep": 0.5, "newline": "drop"}, "newline: 'drop' is unknown, allowed: keep, follow"),
    ],
)
def test_an_unknown_policy_is_refused(policy, message):
    with pytest.raises(ValueError, match=message):
        Policy(**policy)
