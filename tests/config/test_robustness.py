import pytest


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("robustness.questions", 0, "1 <= questions"),
        ("robustness.keep", [], "fractions"),
        ("robustness.keep", [0.5, 1.5], "0 < keep <= 1"),
    ],
)
def test_a_bad_value_is_named_with_what_is_allowed(check_refused, key, value, allowed):
    check_refused(key, value, allowed)
