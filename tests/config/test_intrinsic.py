import pytest

from atr.config.intrinsic import Intrinsic


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("intrinsic.images", 0, "1 <= images"),
        ("intrinsic.pretrain_images", 0, "1 <= pretrain_images"),
        ("intrinsic.epochs", 0, "1 <= epochs"),
        ("intrinsic.overlap_keep", 1.5, "overlap_keep <= 1"),
        ("intrinsic.training_seeds", 0, "1 <= training_seeds"),
    ],
)
def test_a_bad_value_is_named_with_what_is_allowed(check_refused, key, value, allowed):
    check_refused(key, value, allowed)


@pytest.mark.parametrize("values", [{"overlap_keep": 0.0}])
def test_a_value_just_beyond_a_range_is_refused(check_beyond, values):
    check_beyond(Intrinsic, values)


@pytest.mark.parametrize(
    "values",
    [
        {"overlap_keep": 1.0, "images": 1, "training_seeds": 1},
    ],
)
def test_the_ends_of_a_range_are_allowed(check_allowed, values):
    check_allowed(Intrinsic, values)
