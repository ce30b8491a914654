import pytest

from atr.config.prepare import Prepare


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("prepare.benchmarks", "docs", "list[str]"),
        ("prepare.source", "no/such/folder", "folder"),
        ("prepare.source", "cocoa", "coco"),
        ("prepare.repository", "no/such/folder", "hub"),
        ("prepare.images", 0, "1 <= images"),
        ("prepare.questions", -5, "1 <= questions"),
        ("prepare.benchmarks", [], "docs"),
        ("prepare.benchmarks", ["docs", "docs"], "once"),
        ("prepare.split", "train", "evaluate, validation"),
        ("prepare.prompts", [], "one or more texts"),
        ("prepare.prompts", [" "], "one or more texts"),
        ("prepare.benchmarks", ["docs", "docsvqa"], "docvqa"),
    ],
)
def test_a_bad_value_is_named_with_what_is_allowed(check_refused, key, value, allowed):
    check_refused(key, value, allowed)


@pytest.mark.parametrize(
    "values",
    [
        {"images": 1, "questions": 1},
    ],
)
def test_the_ends_of_a_range_are_allowed(check_allowed, values):
    check_allowed(Prepare, values)
