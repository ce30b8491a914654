import pytest

from atr.config.common import Common


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("seed", "seven", "int"),
        ("seed", -1, "0 <= seed"),
        ("seed", 2**32, "seed < 4294967296"),
        ("encoder", "clip", "micro"),
        ("encoder", "tests/no-such-tower", "folder"),
        ("vlm", "llava", "micro"),
        ("vlm", None, "str"),
        ("min_pixels", 0, "null, or 1 <= min_pixels"),
        ("max_pixels", 2**31, "max_pixels <= 2147483647"),
        ("max_pixels", "many", "int | None"),
        ("max_pixels", 1000, "null, as micro sets the size of images itself"),
    ],
)
def test_a_bad_value_is_named_with_what_is_allowed(check_refused, key, value, allowed):
    check_refused(key, value, allowed)


@pytest.mark.parametrize(
    "values",
    [
        {"seed": 0},
        {"seed": 2**32 - 1},
        {"min_pixels": 1, "max_pixels": 2**31 - 1},
    ],
)
def test_the_ends_of_a_range_are_allowed(check_allowed, values):
    check_allowed(Common, values)
