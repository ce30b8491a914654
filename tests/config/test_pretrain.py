import pytest

from atr.config.pretrain import Pretrain


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("pretrain.learning_rat", 0.1, "learning_rate"),
        ("pretrain.layers", "three", "int"),
        ("pretrain.layers", 2.5, "int"),
        ("pretrain.layers", True, "int"),
        ("pretrain.layers", None, "int"),
        ("pretrain.keep", {"a": 1}, "float"),
        ("pretrain.epochs", "${seed}", "int"),
        ("pretrain.epochs", "???", "int"),
        ("pretrain.layers", 0, "1 <= layers"),
        ("pretrain.heads", 0, "1 <= heads"),
        ("pretrain.heads", 5, "a divisor of 192, the width of micro"),
        ("pretrain.ffn_ratio", 0.0001, "0.1 <= ffn_ratio"),
        ("pretrain.keep", 1.5, "0 < keep < 1"),
        ("pretrain.keep", 0.0, "0 < keep < 1"),
        ("pretrain.keep", float("nan"), "0 < keep < 1"),
        ("pretrain.temperature", 0.0, "0.01 <= temperature <= 100"),
        ("pretrain.initial_bias", float("inf"), "initial_bias <= 20"),
        ("pretrain.learning_rate", 0.0, "0 < learning_rate"),
        ("pretrain.weight_decay", -0.1, "0 <= weight_decay"),
        ("pretrain.warmup", 1.0, "warmup < 1"),
        ("pretrain.epochs", 0, "1 <= epochs"),
        ("pretrain.batch_size", 0, "1 <= batch_size"),
        ("pretrain.validation", 1.0, "validation < 1"),
        ("pretrain.collapse_after", 2.0, "collapse_after <= 1"),
        ("pretrain.mask_images", 0, "1 <= mask_images"),
        ("pretrain.position", "learned", "sine"),
        ("pretrain.normalise", "layer", "variance"),
    ],
)
def test_a_bad_value_is_named_with_what_is_allowed(check_refused, key, value, allowed):
    check_refused(key, value, allowed)


@pytest.mark.parametrize("values", [{"keep": 1.0}, {"validation": 0.0}, {"collapse_after": 0.0}])
def test_a_value_just_beyond_a_range_is_refused(check_beyond, values):
    check_beyond(Pretrain, values)


@pytest.mark.parametrize(
    "values",
    [
        {"warmup": 0.0, "weight_decay": 0.0, "learning_rate": 1.0, "ffn_ratio": 16.0},
        {"initial_bias": -20.0, "collapse_after": 1.0, "mask_images": 1},
        {"initial_bias": 20.0, "layers": 1, "heads": 1, "epochs": 1, "batch_size": 1},
    ],
)
def test_the_ends_of_a_range_are_allowed(check_allowed, values):
    check_allowed(Pretrain, values)
