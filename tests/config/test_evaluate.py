import pytest

from atr.config.evaluate import Evaluate


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("evaluate.keep", 0.5, "list[float]"),
        ("evaluate.keep", [0.5, "half"], "list[float]"),
        ("evaluate.keep", [], "fractions"),
        ("evaluate.keep", [0.5, 0.5], "distinct"),
        ("evaluate.keep", [0.5, 0.0], "0 < keep <= 1"),
        ("evaluate.keep", [0.5, 0.5000000001], "that differ in six digits"),
        ("evaluate.keep", [step / 200 for step in range(1, 201)], "1 to 100"),
        ("evaluate.random_seeds", 0, "1 <= random_seeds"),
        ("evaluate.batch_tokens", 0, "1 <= batch_tokens"),
        ("evaluate.max_new_tokens", 0, "1 <= max_new_tokens"),
        ("evaluate.bootstrap", 0, "1 <= bootstrap"),
        ("evaluate.distilled", ["selector"], "distilled, distilled_ranking"),
        ("evaluate.positions", "gappy", "contiguous"),
        ("evaluate.budget", "row", "image, tile"),
        ("evaluate.newline", "drop", "keep, follow"),
        ("evaluate.interpolation", "bilinear", "model, off"),
        ("evaluate.reducers", ["full", "best"], "random"),
        ("evaluate.reducers", ["selector"], "random"),
        ("evaluate.reducers", ["random", "none"], "full"),
        ("evaluate.selectors", ["selector_adaptive"], "selector"),
    ],
)
def test_a_bad_value_is_named_with_what_is_allowed(check_refused, key, value, allowed):
    check_refused(key, value, allowed)


@pytest.mark.parametrize(
    "values",
    [
        {"keep": [1.0], "random_seeds": 1, "batch_tokens": 1, "bootstrap": 1},
    ],
)
def test_the_ends_of_a_range_are_allowed(check_allowed, values):
    check_allowed(Evaluate, values)
