"""Fingerprints of towers of all supported types, before and after changes to their weights."""

from copy import deepcopy

import pytest
import torch
from transformers import (
    Aimv2VisionConfig,
    AutoModel,
    BeitConfig,
    ChineseCLIPVisionConfig,
    CLIPVisionConfig,
    DeiTConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    DINOv3ViTConfig,
    IJepaConfig,
    InternVLVisionConfig,
    MLCDVisionConfig,
    PixioConfig,
    RadioConfig,
    Sapiens2Config,
    SiglipVisionConfig,
    Tipsv2VisionConfig,
    ViTConfig,
    ViTMSNConfig,
)

from atr.core.fingerprint import BITS, MAX_DIFFERING_BITS, fingerprint, is_same_tower
from atr.features.encoder import CLASS_TOKENS

CONFIGS = {
    kind.model_type: kind
    for kind in (
        Aimv2VisionConfig,
        BeitConfig,
        ChineseCLIPVisionConfig,
        CLIPVisionConfig,
        DeiTConfig,
        Dinov2Config,
        Dinov2WithRegistersConfig,
        DINOv3ViTConfig,
        IJepaConfig,
        InternVLVisionConfig,
        MLCDVisionConfig,
        PixioConfig,
        RadioConfig,
        Sapiens2Config,
        SiglipVisionConfig,
        Tipsv2VisionConfig,
        ViTConfig,
        ViTMSNConfig,
    )
}
SHAPE = {
    "hidden_size": 48,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def tower(kind="clip_vision_model", seed=0):
    torch.manual_seed(seed)
    return AutoModel.from_config(CONFIGS[kind](**SHAPE))


def differing(one, other):
    return (int(one, 16) ^ int(other, 16)).bit_count()


@pytest.mark.parametrize("kind", CLASS_TOKENS)
def test_towers_of_equal_shape_are_distinguished(kind):
    one, again, other = (fingerprint(tower(kind, seed)) for seed in (0, 0, 1))
    assert len(one) == BITS // 4
    assert one == again and is_same_tower(one, again)
    assert not is_same_tower(one, other)
    assert MAX_DIFFERING_BITS < differing(one, other) < BITS - MAX_DIFFERING_BITS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_fingerprint_does_not_depend_on_the_dtype(dtype):
    assert fingerprint(tower().to(dtype)) == fingerprint(tower())


def test_a_fine_tuned_tower_is_recognised():
    tuned = deepcopy(tower())
    with torch.no_grad():
        for weight in tuned.parameters():
            weight.add_(0.3 * weight.std(correction=0) * torch.randn_like(weight))
    one, other = fingerprint(tower()), fingerprint(tuned)
    assert differing(one, other) > 0 and is_same_tower(one, other)


def test_the_fingerprint_reads_weights_of_many_filters_and_pixels():
    """A few filters, or a few pixels of all filters, change only some bits."""
    one = tower()
    kernel = one.get_input_embeddings().weight
    changed = deepcopy(one)
    with torch.no_grad():
        changed.get_input_embeddings().weight[: len(kernel) // 8].neg_()
        changed.get_input_embeddings().weight[:, :, :2].neg_()
    found = fingerprint(one), fingerprint(changed)
    assert differing(*found) > 0 and is_same_tower(*found)


def test_weights_on_the_meta_device_have_no_fingerprint():
    assert fingerprint(tower().to("meta")) is None
