"""Tiny random vision-language models with image processors, as folders of the real classes."""

import json

import torch
from transformers import (
    AutoModelForImageTextToText,
    Gemma3Config,
    Gemma3ImageProcessorPil,
    Gemma4Config,
    Gemma4ImageProcessorPil,
    GotOcr2ImageProcessorPil,
    Idefics3Config,
    Idefics3ImageProcessorPil,
    InternVLConfig,
    Mistral3Config,
    PaliGemmaConfig,
    PixtralImageProcessorPil,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen2VLImageProcessorPil,
    Qwen3_5Config,
    Qwen3_5MoeConfig,
    Qwen3VLConfig,
    Qwen3VLMoeConfig,
    SiglipImageProcessorPil,
    SmolVLMConfig,
    SmolVLMImageProcessorPil,
)

TEXT = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 120,
}
ROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}}
TILE = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "patch_size": 14,
    "image_size": 84,
}
NATIVE = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 16,
}
LLAMA = TEXT | {"model_type": "llama", "pad_token_id": 0}
PIXTRAL = TILE | {"model_type": "pixtral", "hidden_size": 32, "head_dim": 16}
GEMMA4 = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "patch_size": 14,
    "pooling_kernel_size": 2,
    "position_embedding_size": 64,
}
IMAGE = {"image_token_id": 100}
SQUARE = {"height": 84, "width": 84}


EXPERTS = {
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 8,
}


def qwen(config, text=None, **vision):
    return config(text_config=TEXT | ROPE | (text or {}), vision_config=NATIVE | vision, **IMAGE)


def qwen_processor():
    return Qwen2VLImageProcessorPil(size={"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 16})


HOSTS = {  # configuration, image processor, its name in the hub's folders
    "qwen2_vl": lambda: (
        qwen(Qwen2VLConfig, embed_dim=32, hidden_size=16, mlp_ratio=2),
        qwen_processor(),
        "Qwen2VLImageProcessor",
    ),
    "qwen2_5_vl": lambda: (
        qwen(Qwen2_5_VLConfig, window_size=56, fullatt_block_indexes=[2]),
        qwen_processor(),
        "Qwen2VLImageProcessorFast",
    ),
    "qwen3_vl": lambda: (
        qwen(Qwen3VLConfig, deepstack_visual_indexes=[0, 1], num_position_embeddings=16),
        qwen_processor(),
        "Qwen2VLImageProcessorFast",
    ),
    "qwen3_5": lambda: (
        qwen(Qwen3_5Config, num_position_embeddings=16),
        qwen_processor(),
        "Qwen2VLImageProcessorFast",
    ),
    "qwen3_vl_moe": lambda: (
        qwen(Qwen3VLMoeConfig, EXPERTS, deepstack_visual_indexes=[0, 1], num_position_embeddings=16),
        qwen_processor(),
        "Qwen2VLImageProcessorFast",
    ),
    "qwen3_5_moe": lambda: (
        qwen(Qwen3_5MoeConfig, EXPERTS, num_position_embeddings=16),
        qwen_processor(),
        "Qwen2VLImageProcessorFast",
    ),
    "gemma3": lambda: (
        Gemma3Config(text_config=TEXT, vision_config=TILE, mm_tokens_per_image=9),
        Gemma3ImageProcessorPil(size=SQUARE, do_pan_and_scan=True, pan_and_scan_min_crop_size=20,
                                pan_and_scan_max_num_crops=4, pan_and_scan_min_ratio_to_activate=1.2),
        "Gemma3ImageProcessor",
    ),
    "paligemma": lambda: (
        PaliGemmaConfig(
            text_config=TEXT | {"model_type": "gemma", "pad_token_id": 0},
            vision_config=TILE | {"model_type": "siglip_vision_model", "vision_use_head": False},
            projection_dim=16,
            **IMAGE,
        ),
        SiglipImageProcessorPil(size=SQUARE),
        "SiglipImageProcessor",
    ),
    "gemma4": lambda: (
        Gemma4Config(text_config=TEXT | {"hidden_size_per_layer_input": 0}, vision_config=GEMMA4),
        Gemma4ImageProcessorPil(patch_size=14, pooling_kernel_size=2, max_soft_tokens=70),
        "Gemma4ImageProcessor",
    ),
    "internvl": lambda: (
        InternVLConfig(
            text_config=TEXT, vision_config=TILE | {"patch_size": [14, 14], "image_size": [84, 84]}, **IMAGE
        ),
        GotOcr2ImageProcessorPil(size=SQUARE, crop_to_patches=True),
        "GotOcr2ImageProcessorFast",
    ),
    "smolvlm": lambda: (
        SmolVLMConfig(text_config=LLAMA, vision_config=TILE, scale_factor=3, **IMAGE),
        SmolVLMImageProcessorPil(size={"longest_edge": 168}, max_image_size={"longest_edge": 84}),
        "SmolVLMImageProcessor",
    ),
    "idefics3": lambda: (
        Idefics3Config(text_config=LLAMA, vision_config=TILE, scale_factor=2, **IMAGE),
        Idefics3ImageProcessorPil(size={"longest_edge": 168}, max_image_size={"longest_edge": 84}),
        "Idefics3ImageProcessor",
    ),
    "mistral3": lambda: (
        Mistral3Config(
            text_config=TEXT | {"model_type": "mistral"}, vision_config=PIXTRAL, vision_feature_layer=-1,
            **IMAGE,
        ),
        PixtralImageProcessorPil(patch_size=14, size={"longest_edge": 112}),
        "PixtralImageProcessorFast",
    ),
}  # fmt: skip


def save(kind, folder):
    """Save the tiny model of a kind, every weight random, as a folder of the hub; return the model."""
    config, processor, name = HOSTS[kind]()
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, 0.08)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"image_processor_type": name}))
    return model
