import pytest

from atr.config.report import Report


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("report.best", "full", "selector"),
        ("report.best", "divprune", "random, selector, distilled"),
        ("report.best", "distilled_ranking", "random, selector, distilled"),
        ("report.best", "selector_adaptive", "selector"),
        ("report.pages", 4, "pages <= 3"),
        ("report.examples", 0, "1 <= examples"),
        ("report.examples", 5000, "examples <= 60"),
    ],
)
def test_a_bad_value_is_named_with_what_is_allowed(check_refused, key, value, allowed):
    check_refused(key, value, allowed)


@pytest.mark.parametrize("values", [{"pages": 0}])
def test_a_value_just_beyond_a_range_is_refused(check_beyond, values):
    check_beyond(Report, values)


@pytest.mark.parametrize(
    "values",
    [
        {"pages": 1, "examples": 1},
        {"pages": 3},
    ],
)
def test_the_ends_of_a_range_are_allowed(check_allowed, values):
    check_allowed(Report, values)
