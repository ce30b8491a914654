import pytest
import torch

from atr.reduction.peers.random import Random
from atr.vlm.policy import Policy
from atr.vlm.prefix import PrefixCache, split_prompts
from atr.vlm.reduce import prepare

FAMILIES = pytest.mark.parametrize("family", ["llava", "llava_next", "llava_onevision"])
PROMPTS = ["<image> a", "<image> b c d", "k <image> e", "<image> f g"]
TWO_IMAGES = ["<image> h <image> a b", "<image> h <image> c", "<image> <image> d e f", "<image> h <image> g"]


@pytest.fixture
def shorten(model, process):
    """The prompts' input reduced to half, each with the images of the first that has as many."""

    def shorten(prompts, keep=0.5, positions="original"):
        from tests.vlm.conftest import random_images

        family = model.config.model_type
        images = [random_images("<image> " * prompts[0].count("<image>"), family) for _ in prompts]
        prepared = prepare(model, process(*prompts, images=images))
        return prepared.reduce(Random(0), Policy(keep, positions)), prepared

    return shorten


def last_logits(model, inputs):
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    given = {"position_ids": positions, **inputs, "use_cache": True}
    return model(**given, logits_to_keep=1).logits[:, -1]


@FAMILIES
@pytest.mark.parametrize("prompts", [PROMPTS, TWO_IMAGES], ids=["one image", "two images"])
@pytest.mark.parametrize("positions", ["original", "contiguous"])
@torch.inference_mode()
def test_branches_of_a_prefix_have_the_logits_of_separate_prompts(model, shorten, prompts, positions):
    reduced, _ = shorten(prompts, positions=positions)
    of_images = [(row, place) for row in range(4) for place in range(prompts[0].count("<image>"))]
    split = split_prompts(model, reduced, [place for _, place in of_images])
    # Three of the four prompts have the same text up to their last image.
    assert sorted(split.prefix_B.bincount().tolist()) == [1, 3]
    cache, _ = PrefixCache.prefill(model, split.prefixes)
    logits_UBV = cache.extend(*split.pack(), keep=3)
    logits = logits_UBV[split.prefix_B, split.branch_B]
    assert torch.allclose(logits, last_logits(model, reduced), atol=1e-5)
