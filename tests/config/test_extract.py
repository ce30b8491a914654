import pytest

from atr.config.extract import Extract


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("extract.layer", "mergd", "null, merged, or -1024 <= layer <= 1024"),
        ("extract.layer", 1025, "null, merged, or -1024 <= layer <= 1024"),
        ("extract.layer", True, "null, merged, or -1024 <= layer <= 1024"),
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
        {"layer": -1024},
        {"layer": 1024},
        {"layer": "merged"},
        {"layer": None},
    ],
)
def test_the_ends_of_a_range_are_allowed(check_allowed, values):
    check_allowed(Extract, values)
