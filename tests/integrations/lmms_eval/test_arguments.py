import pytest
import torch

from atr.integrations.lmms_eval.arguments import Arguments

NEEDED = {"pretrained": "hub/llava", "selector": "hub/selector", "keep": 0.4}


def test_defaults_are_those_of_the_library():
    arguments = Arguments.of(NEEDED | {"batch_size": "4"})  # lmms-eval passes text
    assert arguments.batch_size == 4
    policy = arguments.policy
    assert (policy.keep, policy.positions, policy.budget, policy.newline) == (
        0.4,
        "original",
        "image",
        "keep",
    )
    assert arguments.interpolation == "model"


@pytest.mark.parametrize("keep", [1, 1.0, 0, "adaptive"])
def test_a_count_stays_a_count_and_a_fraction_a_fraction(keep):
    found = Arguments.of(NEEDED | {"keep": keep}).policy.keep
    assert found == keep
    assert type(found) is type(keep)


@pytest.mark.parametrize(
    "given, expected", [("0.1:0.5", (0.1, 0.5)), ("16:0.5", (16, 0.5)), ("0:1.0", (0, 1.0)), ((2, 4), (2, 4))]
)
def test_bounds_are_two_fractions_or_counts(given, expected):
    found = Arguments.of(NEEDED | {"keep": "adaptive", "bounds": given}).policy.bounds
    assert found == expected
    assert list(map(type, found)) == list(map(type, expected))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"keep": 1.2}, r"keep: 1\.2 is out of range, allowed: a fraction 0 <= keep <= 1, or an int"),
        ({"keep": float("nan")}, "keep: nan is out of range"),
        ({"keep": "most"}, "keep: 'most' is unknown, allowed: a fraction, a count, adaptive"),
        ({"keep": True}, "keep: True is out of range, allowed: a fraction, or an int"),
        ({"keep": -5}, "keep: -5 is out of range, allowed: a fraction 0 <= keep <= 1, or an int >= 0"),
        ({"keep": -0.5}, "keep: -0.5 is out of range"),
        ({"keep": None}, "keep: None is out of range"),
        ({"positions": "gappy"}, "positions: 'gappy' is unknown, allowed: original, contiguous"),
        ({"budget": "row"}, "budget: 'row' is unknown, allowed: image, tile"),
        ({"newline": "drop"}, "newline: 'drop' is unknown, allowed: keep, follow"),
        ({"interpolation": "on"}, "interpolation: 'on' is unknown, allowed: model, off"),
        ({"keep": "adaptive", "bounds": "0.5"}, "bounds: '0.5' is not allowed, allowed: low:high, two"),
        ({"keep": "adaptive", "bounds": "a:b"}, "bounds: 'a:b' is not allowed, allowed: low:high"),
        ({"keep": "adaptive", "bounds": "0.9:0.1"}, r"bounds: \(0.9, 0.1\) is out of range, allowed: two"),
        ({"keep": "adaptive", "bounds": 0.1}, "bounds: 0.1 is not allowed, allowed: two fractions"),
        ({"bounds": "0.1:0.5"}, r"bounds: \(0.1, 0.5\) is not allowed with keep 0.4, only with adaptive"),
        ({"min_pixels": 0}, "min_pixels: 0 is not allowed, allowed: an integer >= 1"),
        ({"max_pixels": 0.5}, "max_pixels: 0.5 is not allowed, allowed: an integer >= 1"),
        ({"max_patches": True}, "max_patches: True is not allowed, allowed: an integer >= 1"),
        ({"enable_thinking": 1}, "enable_thinking: 1 is unknown, allowed: True, False"),
        ({"system_prompt": 7}, "system_prompt: 7 is not allowed, allowed: a text"),
        ({"dtype": "int8"}, "dtype: 'int8' is unknown, allowed: auto, float32, float16, bfloat16"),
        ({"device": "gpu"}, "device: 'gpu' is unknown, allowed: cpu, cuda"),
        ({"device": "cuda:99"}, "device: 'cuda:99' does not exist, allowed: cpu"),
        ({"batch_size": "auto"}, "batch_size: 'auto' is not allowed, allowed: an integer >= 1"),
        ({"batch_size": 0}, "batch_size: '0' is not allowed"),
        ({"pretrained": 7}, "pretrained: 7 is not allowed, allowed: a folder or hub id"),
        ({"selector": ""}, "selector: '' is not allowed, allowed: a folder or hub id"),
        ({"selektor": "x"}, "selektor: 'x' is unknown, allowed: pretrained, selector, keep, positions"),
        (
            {"positions": "original", "attn_implementation": "flash_attention_2"},
            "positions: original is not safe under flash_attention_2, allowed: contiguous",
        ),
    ],
)
def test_a_wrong_argument_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        Arguments.of(NEEDED | change)


@pytest.mark.parametrize("key", NEEDED)
def test_a_missing_argument_is_named(key):
    with pytest.raises(ValueError, match=f"{key}: is missing, needed: pretrained, selector, keep"):
        Arguments.of({name: value for name, value in NEEDED.items() if name != key})


def test_an_existing_device_is_allowed():
    assert torch.device(Arguments.of(NEEDED | {"device": "cpu"}).device or "") == torch.device("cpu")
