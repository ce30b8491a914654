from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    BloomConfig,
    CLIPVisionConfig,
    Gemma3Config,
    LlavaConfig,
    MistralConfig,
    PaliGemmaConfig,
    Qwen2Config,
    Qwen3NextConfig,
    SiglipVisionConfig,
)

from atr.reduction.peers.random import Random
from atr.vlm.policy import Policy
from atr.vlm.prefix import NO_BRANCH, PrefixCache, split_prompts, why_not_shared
from atr.vlm.reduce import prepare

FAMILIES = pytest.mark.parametrize("family", ["llava", "llava_next", "llava_onevision"])
# Three prompts of each list have the same text up to their last image.
PROMPTS = ["<image> a", "<image> b c d", "k <image> e", "<image> f g"]
TWO_IMAGES = ["<image> h <image> a b", "<image> h <image> c", "<image> <image> d e f", "<image> h <image> g"]


@pytest.fixture
def shorten(model, process, make_pictures):
    """The prompts' input reduced to half; all show the same images."""

    def shorten(prompts, positions="original"):
        images = make_pictures(prompts[0].count("<image>"))
        prepared = prepare(model, process(*prompts, images=[images] * len(prompts)))
        reduced = prepared.reduce(Random(0), Policy(0.5, positions))
        return reduced, list(range(len(images))) * len(prompts)

    return shorten


def last_logits(model, inputs):
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    given = {"position_ids": positions, **inputs, "use_cache": True}
    return model(**given, logits_to_keep=1).logits[:, -1]


def branch_logits(model, reduced, images):
    split = split_prompts(model, reduced, images)
    cache, _ = PrefixCache.prefill(model, split.prefixes)
    most = int(split.branch_B.max()) + 1
    return split, cache.extend(split.pack(), keep=most)[split.prefix_B, split.branch_B]


@FAMILIES
@pytest.mark.parametrize("prompts", [PROMPTS, TWO_IMAGES], ids=["one image", "two images"])
@pytest.mark.parametrize("positions", ["original", "contiguous"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.inference_mode()
def test_branches_of_a_prefix_have_the_logits_of_separate_prompts(
    model, shorten, prompts, positions, attention
):
    model.set_attn_implementation({"text_config": attention})
    reduced, images = shorten(prompts, positions)
    split, logits = branch_logits(model, reduced, images)
    assert split.prefix_B.tolist() == [0, 0, 1, 0] and split.branch_B.tolist() == [0, 1, 0, 2]
    assert torch.allclose(logits, last_logits(model, reduced), atol=1e-5)


@torch.inference_mode()
def test_the_mask_has_the_language_models_precision(model, shorten):
    """In a deployment that is compared, the tower alone is in bfloat16."""
    reduced, images = shorten(PROMPTS)
    _, expected = branch_logits(model, reduced, images)
    model.model.vision_tower.bfloat16()
    assert torch.equal(branch_logits(model, reduced, images)[1], expected)


@torch.inference_mode()
def test_prompts_about_different_images_share_nothing(model, shorten):
    reduced, _ = shorten(PROMPTS)
    split, logits = branch_logits(model, reduced, [0, 1, 2, 1])
    assert split.prefix_B.tolist() == [0, 1, 2, 1]
    assert torch.allclose(logits, last_logits(model, reduced), atol=1e-5)


def test_gradients_reach_what_the_branches_share(model, shorten):
    reduced, images = shorten(PROMPTS)
    weight = model.model.multi_modal_projector.linear_1.weight
    separate, shared = (
        torch.autograd.grad(logits.exp().sum(), weight, retain_graph=True)[0]
        for logits in (last_logits(model, reduced), branch_logits(model, reduced, images)[1])
    )
    assert separate.abs().max() > 0 and torch.allclose(shared, separate, rtol=1e-3, atol=1e-4)


def test_suffixes_stand_side_by_side_with_their_last_tokens_at_the_end(model, shorten):
    reduced, images = shorten(PROMPTS)
    tokens = split_prompts(model, reduced, images).pack()
    letters = {letter: 5 + place for place, letter in enumerate("abcdefghijk")}
    assert tokens.ids_UT[0].tolist() == [letters[letter] for letter in "bcfadg"]
    assert tokens.branch_UT.tolist() == [[1, 1, 2, 0, 1, 2], [*[NO_BRANCH] * 3, 0, NO_BRANCH, NO_BRANCH]]


@pytest.mark.parametrize("prompts", [["<image> a", "b"], ["<image> a", "b <image>"]])
def test_prompts_without_image_or_without_text_behind_it_are_not_split(model, process, prompts):
    reduced = prepare(model, process(*prompts)).reduce(Random(0), Policy(0.5))
    assert split_prompts(model, reduced, reduced.image_of) is None


SMALL = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 8,
}  # fmt: skip
TOWER = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip


def llava(text):
    return LlavaConfig(vision_config=CLIPVisionConfig(**TOWER), text_config=text)


UNSHARED = {
    "mistral": llava(MistralConfig(**SMALL, sliding_window=8)),
    "qwen2 with windows": llava(
        Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=8, max_window_layers=2)
    ),
    "qwen3_next": llava(Qwen3NextConfig(**SMALL, head_dim=8, num_experts=2, num_experts_per_tok=1)),
    "gemma3": Gemma3Config(
        vision_config=SiglipVisionConfig(**TOWER),
        text_config={**SMALL, "head_dim": 8, "layer_types": ["full_attention"] * 4},
    ),
    "paligemma": PaliGemmaConfig(
        vision_config=SiglipVisionConfig(**TOWER), text_config={"model_type": "gemma", **SMALL, "head_dim": 8}
    ),
}
REASONS = {
    "mistral": "the cache of mistral has layers of type DynamicSlidingWindowLayer",
    "qwen2 with windows": "the cache of qwen2 has layers of type DynamicSlidingWindowLayer",
    "qwen3_next": "the cache of qwen3_next has layers of type LinearAttentionLayer",
    "gemma3": "gemma3 lets the tokens of a prefix see later ones",
    "paligemma": "paligemma lets the tokens of a prefix see later ones",
}


@pytest.mark.parametrize("name", UNSHARED)
def test_a_cache_that_cannot_be_shared_is_known_by_its_configuration(name):
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(UNSHARED[name])
    assert why_not_shared(model).startswith(REASONS[name])


def test_a_language_model_without_position_ids_shares_nothing(make_model):
    text = BloomConfig(vocab_size=31, hidden_size=32, n_layer=1, n_head=4, pad_token_id=0)
    assert why_not_shared(make_model(text_config=text)) == "bloom takes no position ids"


@FAMILIES
def test_the_supported_families_share_unless_their_kernel_takes_no_mask(model):
    assert why_not_shared(model) == ""
    text = SimpleNamespace(_attn_implementation="flash_attention_2")
    flash = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: text))
    assert (
        why_not_shared(flash) == "attention kernel flash_attention_2 takes no mask of its own for each token"
    )
