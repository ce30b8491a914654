"""Tiny random copies of vision-language models: the real class, two layers, widths of 32.

A copy has the layer kinds, token merging and position rules of its model, so that what is proven of the copy
holds for the code of the model type. It takes well under a second to build and to run.
"""

import inspect
from collections.abc import Iterator, Mapping
from copy import deepcopy
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from atr.vlm.families.tiny_inputs import tiny_inputs

__all__ = ["TINY_TYPES", "attention_kinds", "load_config", "tiny_config", "tiny_inputs", "tiny_model"]

_WIDTH, _HEADS, _HEAD_WIDTH, _LAYERS, _VOCABULARY = 32, 2, 16, 2, 128
_PATCH, _SIDE = 4, 6
"""Pixels of a patch, and patches of a square image's side."""

_SIZES: dict[str, Any] = {
    **dict.fromkeys(
        ("hidden_size", "embed_dim", "d_model", "out_hidden_size", "projection_dim", "projector_hidden_size"),
        _WIDTH,
    ),
    **dict.fromkeys(("projection_hidden_size", "output_channels", "mlp_dim"), _WIDTH),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "depth"), _LAYERS),
    **dict.fromkeys(("num_attention_heads", "num_heads"), _HEADS),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), _HEADS),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), _HEAD_WIDTH),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), _HEAD_WIDTH),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "hidden_size_per_layer_input"), 8),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), _VOCABULARY),
    **dict.fromkeys(("pos_emb_height", "pos_emb_width"), _SIDE),
    **dict.fromkeys(("num_position_embeddings", "num_patches"), _SIDE**2),
    "patch_size": _PATCH,
    "image_size": _PATCH * _SIDE,
    "position_embedding_size": 64,
    "query_pre_attn_scalar": _HEAD_WIDTH,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 0,
    "block_multiple_of": 8,
    "fullatt_block_indexes": [1],
    "deepstack_visual_indexes": [0, 1],
    "global_attn_indexes": [1],
    "insert_layer_id": 0,
}
"""The value of a key wherever in a configuration it stands; keys of another type or of None stay."""

_DERIVED = ("qk_head_dim", "per_layer_config", "num_image_tokens", "full_attn_idxs", "dtype", "torch_dtype")
"""Keys that the configuration derives from others, or that belong to a checkpoint's weights."""
_CHECKPOINT = (
    "id2label",
    "label2id",
    "quantization_config",
    "architectures",
    "transformers_version",
    "_name_or_path",
)

_SMALL_WINDOWS = {"vision_config": {"window_size": 4 * _PATCH}}
"""Windows smaller than an image, or their order would be that of the image."""
_OVERRIDES: dict[str, dict[str, Any]] = {
    # A 4 x 4 average pool over 12 x 12 patches.
    "gemma3": {"vision_config": {"image_size": 12 * _PATCH}, "mm_tokens_per_image": 9},
    # A kernel of 3 x 3 patches; without a vision configuration the model would have no tower.
    "gemma4": {"vision_config": {"num_key_value_heads": _HEADS, "pooling_kernel_size": 3}},
    # Two convolutions of stride 2 after the tower.
    "got_ocr2": {"vision_config": {"image_size": 12 * _PATCH, "window_size": 4}},
    "lfm2_vl": {"text_config": {"layer_types": ["conv", "full_attention"]}},
    "exaone4_5": _SMALL_WINDOWS,
    "hyperclovax_vision_v2": _SMALL_WINDOWS,
    "qwen2_5_vl": _SMALL_WINDOWS,
    # Its default names no placeholder.
    "minicpmv4_6": {
        "vision_config": {"image_size": 8 * _PATCH},
        "image_token_id": 120,
        "video_token_id": 121,
    },
    "ovis2": {"vision_config": {"hidden_stride": 2}},
    "aya_vision": {"text_config": {"sliding_window": 4096}},
}
"""What the rule cannot know of a model type, over the shrunk configuration."""

TINY_TYPES = (
    "llava", "vipllava", "llava_next", "llava_next_video", "llava_onevision", "qwen2_vl", "qwen2_5_vl",
    "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "gemma3", "gemma4", "paligemma", "internvl",
    "smolvlm", "idefics3", "mistral3", "aya_vision", "cohere2_vision", "glm4v", "glm46v", "glm_ocr",
    "paddleocr_vl", "ernie4_5_vl_moe", "kimi_k25", "lfm2_vl", "minicpmv4_6", "ovis2", "lighton_ocr",
    "got_ocr2", "exaone4_5", "hyperclovax_vision_v2",
)  # fmt: skip
"""Model types whose default configuration makes a tiny copy."""


def tiny_config(config: Any, **text: Any) -> Any:
    """A configuration of the same class with tiny sizes; `config` may be the name of a model type.

    `text` overrides keys of the language model's configuration after all else. Raises ValueError, one line,
    for a type that transformers does not know as a vision-language model, and for a configuration that
    cannot be shrunk.
    """
    if isinstance(config, str):
        config = _default_config(config)
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise ValueError(f"model type {config.model_type!r} is no image-text-to-text model of transformers")
    values = config.to_dict()
    ids = {number: _VOCABULARY - 1 - at for at, number in enumerate(sorted(set(_special_ids(values))))}
    shrunk = _shrink(values, ids)
    _override(shrunk, _OVERRIDES.get(config.model_type, {}))
    shrunk.setdefault("text_config", {}).update(text)
    try:
        return _with_positions(type(config).from_dict(shrunk))
    except Exception as error:  # configurations validate themselves, each in its own way
        raise ValueError(f"model type {config.model_type!r} cannot be shrunk: {_line(error)}") from error


def load_config(folder_or_type: str) -> Any:
    """The configuration of a local folder, or the default one of a model type.

    Raises ValueError, one line, for a folder without a valid configuration, and for an unknown type.
    """
    if not Path(folder_or_type).is_dir():
        return _default_config(folder_or_type)
    try:
        return AutoConfig.from_pretrained(folder_or_type, local_files_only=True)
    except Exception as error:  # missing, damaged, or of a type that transformers does not know
        raise ValueError(f"{folder_or_type}: its configuration cannot be read: {_line(error)}") from error


def tiny_model(
    config: Any, attention: str = "eager", dtype: torch.dtype = torch.float32, seed: int = 0
) -> Any:
    """A model of a configuration, usually of `tiny_config`, with every weight drawn from a fixed seed.

    Weights have a standard deviation of .08, so that tokens matter; vectors, as the weights of norms, are
    that far from their first values. It is in evaluation mode, and generates to the full length. Raises
    ValueError, one line, if it cannot be built.
    """
    kind = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = kind._from_config(deepcopy(config), attn_implementation=attention, dtype=torch.float32)
        except Exception as error:  # a tower of a library that is not installed, widths that do not fit, ...
            raise ValueError(f"model type {config.model_type!r} cannot be built: {_line(error)}") from error
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            drawn = torch.randn(weight.shape, generator=generator) * 0.08
            weight.copy_(weight + drawn if weight.ndim == 1 else drawn)
    model.generation_config = GenerationConfig(pad_token_id=0)
    return model.to(dtype).eval()


def attention_kinds(config: Any) -> tuple[str, ...]:
    """The attention implementations that a configuration's model supports, of eager and sdpa."""
    return (
        ("eager", "sdpa") if MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]._supports_sdpa else ("eager",)
    )


def _default_config(model_type: str) -> Any:
    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"{model_type!r} is neither a local folder nor a model type of transformers")
    config = CONFIG_MAPPING[model_type]()
    if model_type == "gemma4":  # its default has no images
        config = type(config)(vision_config={"model_type": "gemma4_vision"})
    return config


def _special_ids(values: Mapping[str, Any]) -> Iterator[int]:
    """The ids of all special tokens in a nested configuration."""
    for key, value in values.items():
        if key.endswith("_config"):
            yield from _special_ids(value or {})
        elif _names_tokens(key):
            numbers = value if isinstance(value, list) else [value]
            yield from (number for number in numbers if isinstance(number, int))


def _names_tokens(key: str) -> bool:
    return key.endswith(("token_id", "token_ids", "token_index"))


def _shrink(values: Mapping[str, Any], ids: Mapping[int, int]) -> dict[str, Any]:
    """A nested configuration with tiny sizes; special tokens are renumbered by `ids`."""
    shrunk: dict[str, Any] = {}
    for key, value in values.items():
        if key in _DERIVED or key in _CHECKPOINT:
            continue
        shrunk[key] = (
            _shrink(value, ids) if key.endswith("_config") and value else _shrink_value(key, value, ids)
        )
    _fit(shrunk, values)
    _share_axes(shrunk)
    return shrunk


def _shrink_value(key: str, value: Any, ids: Mapping[int, int]) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if _names_tokens(key):
        return [ids[number] for number in value] if isinstance(value, list) else ids.get(value, value)
    if key.endswith("intermediate_size"):
        return [_WIDTH] * len(value) if isinstance(value, list) else _WIDTH
    if key in _SIZES:
        size = _SIZES[key]
        is_pair = isinstance(value, list | tuple) and isinstance(size, int)
        return [size] * len(value) if is_pair else size
    return value


def _fit(shrunk: dict[str, Any], values: Mapping[str, Any]) -> None:
    """Make what depends on several keys of one configuration consistent."""
    if values.get("num_key_value_heads"):
        is_shared = values["num_key_value_heads"] < (values.get("num_attention_heads") or 0)
        shrunk["num_key_value_heads"] = 1 if is_shared else _HEADS
    if values.get("head_dim"):
        factor = (values.get("rope_parameters") or {}).get("partial_rotary_factor", 1.0)
        shrunk["head_dim"] = 8 if "qk_rope_head_dim" in values else _HEAD_WIDTH * (2 if factor != 1 else 1)
    for key in ("layer_types", "mlp_layer_types"):
        if kinds := list(dict.fromkeys(values.get(key) or ())):
            shrunk[key] = (kinds * _LAYERS)[: max(_LAYERS, len(kinds))]
            shrunk["num_hidden_layers"] = len(shrunk[key])
    if layer := values.get("vision_feature_layer"):
        shrunk["vision_feature_layer"] = [-2, -1, 1] if isinstance(layer, list) else max(layer, -2)
    if pinpoints := values.get("image_grid_pinpoints"):
        side = values["vision_config"]["image_size"]
        shrunk["image_grid_pinpoints"] = [
            [size // side * _PATCH * _SIDE for size in pair] for pair in pinpoints
        ]


def _share_axes(shrunk: dict[str, Any]) -> None:
    """Share the tiny rotary width over the axes of positions, where the configuration does so."""
    rope = shrunk.get("rope_parameters") or {}
    if "mrope_section" in rope:
        width = shrunk.get("head_dim") or _WIDTH // _HEADS
        sections = _sections(int(width * rope.get("partial_rotary_factor", 1.0)) // 2)
        shrunk["rope_parameters"] = {**rope, "mrope_section": sections}


def _sections(half: int) -> list[int]:
    share = 3 * half // 8
    return [share, share, half - 2 * share]


def _override(values: dict[str, Any], overrides: Mapping[str, Any]) -> None:
    for key, value in overrides.items():
        if isinstance(value, Mapping):
            _override(values.setdefault(key, {}), value)
        else:
            values[key] = value


def _with_positions(config: Any) -> Any:
    """The same where the language model has several axes of positions, of which the defaults do not tell."""
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None)
    if rope is None or not _reads_axes(type(text).__module__):
        return config
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    rope["mrope_section"] = _sections(int(width * rope.get("partial_rotary_factor", 1.0)) // 2)
    return config


@cache
def _reads_axes(config_module: str) -> bool:
    """Whether the models of a configuration's module divide their rotary width over several axes."""
    modeling = import_module(config_module.replace(".configuration_", ".modeling_"))
    return "mrope_section" in inspect.getsource(modeling)


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
