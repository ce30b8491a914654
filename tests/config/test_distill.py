import pytest

from atr.config.distill import Distill


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("distill.heads", 7, "a divisor of 192, the width of micro"),
        ("distill.epochs", 0, "1 <= epochs"),
        ("distill.lowest", 0.0, "0 < lowest < 1"),
        ("distill.highest", 0.01, "distill.lowest, 0.05, <= highest <= 1"),
        ("distill.learning_rate", 0.0, "0 < learning_rate"),
        ("distill.temperature", float("inf"), "temperature <= 100"),
        ("distill.position", "absolute", "none, sine"),
        ("distill.ffn_ratio", 17.0, "ffn_ratio <= 16"),
    ],
)
def test_a_bad_value_is_named_with_what_is_allowed(check_refused, key, value, allowed):
    check_refused(key, value, allowed)


@pytest.mark.parametrize("values", [{"lowest": 1.0, "highest": 1.0}])
def test_a_value_just_beyond_a_range_is_refused(check_beyond, values):
    check_beyond(Distill, values)


@pytest.mark.parametrize(
    "values",
    [
        {"lowest": 0.3, "highest": 0.3},
        {"highest": 1.0, "images": 1, "max_new_tokens": 1},
    ],
)
def test_the_ends_of_a_range_are_allowed(check_allowed, values):
    check_allowed(Distill, values)
