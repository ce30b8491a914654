"""Bounds of an image's area, given with a model's preset, hold for its questions and stand in its record."""

import runpy
from pathlib import Path

import pytest
import torch
from PIL import Image

from atr.config.evaluate import Evaluate
from atr.config.presets import VlmPreset
from atr.reduction.peers.full import Full
from atr.vlm.generation import Generator

WRITE = runpy.run_path(str(Path(__file__).parents[1] / "checkpoints.py"))["write"]


class Picture:
    """One picture of 64 x 48 pixels, 48 tokens of 8 x 8 pixels if it is not resized."""

    def image(self, name):
        return Image.new("RGB", (64, 48), "orange")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {family: str(WRITE(tmp_path_factory.mktemp(family), family)) for family in ("qwen3_vl", "gemma3")}


def load(folder, **bounds):
    preset = VlmPreset("tiny", folder, None, False, **bounds)
    settings = Evaluate(max_new_tokens=2)
    return Generator.load(preset, 32, torch.device("cpu"), Picture, lambda: 1 / 0, settings)


@pytest.mark.parametrize(
    ("bounds", "tokens"),
    [
        ({}, 20),  # the processor's own 1,536: 5 x 4
        ({"max_pixels": 800}, 12),  # 4 x 3
        ({"min_pixels": 3_900, "max_pixels": 6_400}, 70),  # 10 x 7, a little above the lower bound
    ],
)
def test_tokens_of_an_image_follow_the_bounds(folders, bounds, tokens):
    generator = load(folders["qwen3_vl"], **bounds)
    (reply,) = generator.answer(generator.prepare([["any"]], ["w3"]), Full(), 1.0)
    assert reply.tokens_full == tokens
    whole = {"min_pixels": None, "max_pixels": None} | bounds
    assert generator.resolved.get("pixels") == (whole if bounds else None)


def test_a_model_that_sets_the_size_of_images_refuses_bounds(folders):
    with pytest.raises(
        ValueError, match=rf"^{folders['gemma3']}: min_pixels and max_pixels: .* allowed: null$"
    ):
        load(folders["gemma3"], max_pixels=900)
