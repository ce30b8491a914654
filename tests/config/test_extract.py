import pytest

from atr.config.extract import Extract


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("extract.layer", "last", "int | None"),
        ("extract.batch_size", 0, "1 <= batch_size"),
        ("extract.shard_images", 0, "1 <= shard_images"),
        ("extract.workers", -1, "0 <= workers"),
    ],
)
def test_a_bad_value_is_named_with_what_is_allowed(check_refused, key, value, allowed):
    check_refused(key, value, allowed)


@pytest.mark.parametrize(
    "values",
    [
        {"batch_size": 1, "shard_images": 1, "workers": 0},
    ],
)
def test_the_ends_of_a_range_are_allowed(check_allowed, values):
    check_allowed(Extract, values)
