"""NaN and infinity are refused wherever they are; finite values pass."""

import pytest
import torch

from atr.core.finite import check_finite, check_finite_weights

WRONG = [float("nan"), float("inf"), -float("inf")]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("wrong", WRONG)
def test_images_are_named(dtype, wrong):
    values = torch.zeros(4, 3, 2, dtype=dtype)
    check_finite(values, "features")
    values[1, 2, 0] = values[3, 0, 1] = wrong
    message = r"^features of images \[1, 3\] of 4 holds NaN or infinity, allowed: finite values$"
    with pytest.raises(ValueError, match=message):
        check_finite(values, "features")


@pytest.mark.parametrize("wrong", WRONG)
def test_weights_are_counted_and_the_first_is_named(wrong):
    weights = {"a": torch.zeros(3), "b": torch.tensor([0.0, wrong, wrong]), "c": torch.tensor(wrong)}
    message = r"^file: 2 of 3 tensors hold NaN or infinity, first b \(2 of its 3 values\), allowed: finite"
    with pytest.raises(ValueError, match=message):
        check_finite_weights(weights, "file")


def test_integers_empty_and_meta_tensors_are_skipped():
    meta = torch.empty(2, device="meta")
    check_finite_weights({"counts": torch.tensor([1]), "none": torch.empty(0), "elsewhere": meta}, "file")
