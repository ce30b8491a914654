import pytest

from atr.config.latency import Latency


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("latency.kept", [], "fractions"),
        ("latency.kept", [0.5, 1.5], "0 < kept <= 1"),
        ("latency.batches", [1, 1], "distinct"),
        ("latency.batches", [0], ">= 1"),
        ("latency.seconds", 0.0, "0 < seconds"),
    ],
)
def test_a_bad_value_is_named_with_what_is_allowed(check_refused, key, value, allowed):
    check_refused(key, value, allowed)


@pytest.mark.parametrize("values", [{"kept": [0.0]}, {"kept": [0.5, 0.5]}])
def test_a_value_just_beyond_a_range_is_refused(check_beyond, values):
    check_beyond(Latency, values)


@pytest.mark.parametrize(
    "values",
    [
        {"kept": [1.0], "batches": [1], "seconds": 60.0},
    ],
)
def test_the_ends_of_a_range_are_allowed(check_allowed, values):
    check_allowed(Latency, values)
