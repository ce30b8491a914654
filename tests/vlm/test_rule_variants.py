"""Deployments of families of the rule: every variant changes its part of a tiny model and puts it back."""

import copy
import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from atr.config import Evaluate
from atr.core.records import Question
from atr.features.merged import vision_tower
from atr.reduction.peers.l2_norm import L2Norm
from atr.vlm.checkpoint import load_vlm
from atr.vlm.generation import Generator
from atr.vlm.inputs import ImageInputs
from atr.vlm.robustness import RobustnessSettings, robustness
from atr.vlm.variants import VARIANTS, Variant, after_encoding, deploy, pixel_digest

ROOT = Path(__file__).parents[2]
SLOW = [pytest.param(kind, marks=pytest.mark.exhaustive) for kind in ("gemma3", "idefics3", "qwen3_vl")]


def photograph(width=120, height=90):
    """Smooth, with edges."""
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / 9), np.cos(y / 7), np.sin((x + y) / 11) * (x > 60)], -1)
    return Image.fromarray((127.5 * (1 + waves)).astype(np.uint8))


@pytest.fixture(scope="module", params=["qwen2_5_vl", "internvl", *SLOW])
def generator(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ruled")
    runpy.run_path(str(ROOT / "tests/checkpoints.py"))["write"](folder, request.param)
    model, processor = load_vlm(str(folder), torch.float32)
    images = SimpleNamespace(image=lambda name: photograph(120 + 8 * len(name)))
    settings = Evaluate(positions="original", max_new_tokens=2)
    return Generator(model, processor, ImageInputs(model, processor, images), settings)


@torch.inference_mode()
def deployed(generator, variant):
    """The tokens that the language model is fed in a deployment, an answer, and the digest of the pixels."""
    with deploy(generator, variant) as changed:
        batch = changed.prepare([["p"]], ["w3 w4"])
        asked, batch = after_encoding(changed, batch, variant)
        (reply,) = asked.answer(batch, L2Norm(), 0.5)
        assert 0 < reply.tokens < reply.tokens_full
        assert {group.features_BND.dtype for group in batch.whole.encoded.groups} <= {
            torch.float32,
            torch.bfloat16,
        }
        return torch.cat(list(batch.whole.tokens.images)).float(), pixel_digest(changed, "p")


@pytest.mark.parametrize("name", VARIANTS)
def test_each_variant_changes_its_part_and_restores_the_model(generator, name):
    own, variant = vision_tower(generator.model), VARIANTS[name]
    before = copy.deepcopy(own.state_dict())
    (tokens, pixels), (others, other_pixels) = (deployed(generator, one) for one in (Variant(), variant))
    is_same = torch.equal(tokens, others)
    if name in ("batch of one", "contiguous positions"):
        assert is_same
    elif name == "resize by Pillow bilinear":
        assert is_same == (pixels == other_pixels), "some processors resize so themselves"
    elif name != "eager attention":
        assert not is_same
    assert pixels == other_pixels or variant.is_of_images
    assert vision_tower(generator.model) is own and not own._forward_hooks
    assert all(torch.equal(value, before[key]) for key, value in own.state_dict().items())
    assert own.config._attn_implementation == "sdpa"


def test_overlaps_and_scores_are_compared_for_images_of_their_own_grids(generator):
    questions = [
        Question(f"docs#{place}", "docs", "text", [name], "w3 w5", answers=["w9"])
        for place, name in enumerate(("p", "pp"))
    ]
    names = ("bfloat16 weights", "features stored in bfloat16", "JPEG 50", "contiguous positions")
    found = robustness(
        generator,
        {"l2_norm": L2Norm()},
        questions,
        lambda question, prediction: float(len(prediction) % 2),
        generator,
        ["p"],
        RobustnessSettings(keep=[0.25, 0.5], batch_tokens=200, resamples=20, seed=3),
        with_full=True,
        variants={name: VARIANTS[name] for name in names},
    )
    assert [variant["name"] for variant in found["variants"]] == list(names)
    for variant in found["variants"]:
        overlaps = variant["reducers"]["l2_norm"]["iou"]
        assert all(0 < overlap["lowest"] <= overlap["mean"] <= 1 for overlap in overlaps)
    assert found["variants"][-1]["reducers"]["l2_norm"]["iou"][0]["lowest"] == 1
