"""Folders of tiny vision-language models of the rule, each with a processor of its own class.

`write(folder, model_type)` makes one. Weights are random; words are `w3` to `w59` and the processor's tokens.
"""

import json
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import (
    Gemma3ImageProcessorPil,
    GotOcr2ImageProcessorPil,
    Idefics3ImageProcessorPil,
    PixtralImageProcessorPil,
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessorPil,
    SmolVLMImageProcessorPil,
)

from atr.vlm.families.tiny import tiny_config, tiny_model

_QWEN = ("<|image_pad|>", "<|vision_start|>", "<|vision_end|>")
_TILED = (
    "<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>",
    *(f"<row_{row}_col_{column}>" for row in (1, 2, 3, 4) for column in (1, 2, 3, 4)),
)  # fmt: skip
TOKENS = {
    "qwen2_5_vl": (*_QWEN, "<|video_pad|>"),
    "qwen3_vl": (*_QWEN, "<|video_pad|>"),
    "gemma3": ("<image_soft_token>", "<start_of_image>", "<end_of_image>"),
    "internvl": ("<IMG_CONTEXT>", "<img>", "</img>", "<video>"),
    "smolvlm": _TILED,
    "idefics3": _TILED,
    "mistral3": ("[IMG]", "[IMG_BREAK]", "[IMG_END]"),
}
"""Special tokens of each processor; the first one is the placeholder of a visual token."""
_IN_TEMPLATE = {"qwen": "<|vision_start|><|image_pad|><|vision_end|>", "gemma3": "<start_of_image>"}
_NAMED = {
    "gemma3": {
        "image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>",
    },
    "internvl": {
        "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    },
}  # fmt: skip
_PROCESSORS = {
    "qwen2_5_vl": "Qwen2_5_VLProcessor",
    "qwen3_vl": "Qwen3VLProcessor",
    "gemma3": "Gemma3Processor",
    "internvl": "InternVLProcessor",
    "smolvlm": "SmolVLMProcessor",
    "idefics3": "Idefics3Processor",
    "mistral3": "PixtralProcessor",
}
_SIDE = 24
"""Pixels of a tile's side; 3 x 3 tokens of 2 x 2 patches of 4 x 4 pixels."""


def write(folder: Path, model_type: str, dtype: torch.dtype = torch.float32, **text) -> Path:
    """A checkpoint with its processor; `text` overrides keys of the language model's configuration."""
    ids = {token: 60 + place for place, token in enumerate(TOKENS[model_type])}
    config = tiny_config(model_type, **text)
    for name, token in _token_ids(model_type).items():
        setattr(config, name, ids[token])
    config.text_config.update({"bos_token_id": None, "pad_token_id": 0, "eos_token_id": 2})
    model = tiny_model(config, dtype=dtype)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder)
    _tokenizer(model_type, ids).save_pretrained(folder)
    _image_processor(model_type).save_pretrained(folder)
    settings = {"processor_class": _PROCESSORS[model_type], **_settings(model_type)}
    (Path(folder) / "processor_config.json").write_text(json.dumps(settings))
    return Path(folder)


def _token_ids(model_type: str) -> dict[str, str]:
    """The token of each id that the configuration has."""
    tokens = TOKENS[model_type]
    if model_type.startswith("qwen"):
        names = "image_token_id", "vision_start_token_id", "vision_end_token_id", "video_token_id"
        return dict(zip(names, tokens, strict=True))
    if model_type == "gemma3":
        return dict(zip(("image_token_index", "boi_token_index", "eoi_token_index"), tokens, strict=True))
    return {"image_token_index" if model_type == "mistral3" else "image_token_id": tokens[0]}


def _tokenizer(model_type: str, ids: dict[str, int]) -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{number}": number for number in range(3, 60)}, **ids}
    words |= {"<unk>": max(words.values()) + 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ids])
    image = _IN_TEMPLATE.get(model_type.split("2")[0].split("3_")[0], TOKENS[model_type][0])
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        extra_special_tokens=_NAMED.get(model_type, {}),
    )
    made.chat_template = (
        "{% for message in messages %}w3 {% for item in message['content'] %}"
        "{% if item['type'] == 'image' %}IMAGE w4 {% else %}{{ item['text'] }} {% endif %}"
        "{% endfor %}{% endfor %}{% if add_generation_prompt %}w5{% endif %}"
    ).replace("IMAGE", image)
    return made


def _image_processor(model_type: str):
    square = {"size": {"height": _SIDE, "width": _SIDE}}
    longest = {"size": {"longest_edge": 4 * _SIDE}, "max_image_size": {"longest_edge": _SIDE}}
    makers = {
        "gemma3": lambda: Gemma3ImageProcessorPil(size={"height": 48, "width": 48}),
        "internvl": lambda: GotOcr2ImageProcessorPil(
            **square, crop_to_patches=True, min_patches=1, max_patches=4
        ),
        "smolvlm": lambda: SmolVLMImageProcessorPil(**longest, do_image_splitting=True),
        "idefics3": lambda: Idefics3ImageProcessorPil(**longest, do_image_splitting=True),
        "mistral3": lambda: PixtralImageProcessorPil(
            size={"longest_edge": 48}, patch_size={"height": 4, "width": 4}
        ),
    }
    if model_type in makers:
        return makers[model_type]()
    areas = {"shortest_edge": 4 * 64, "longest_edge": 24 * 64}
    return Qwen2VLImageProcessorPil(size=areas, patch_size=4, merge_size=2, temporal_patch_size=2)


def _settings(model_type: str) -> dict:
    """Settings of the processor: how many tokens its tiles have."""
    return {
        "gemma3": {"image_seq_length": 9},
        "internvl": {"image_seq_length": 9},
        "smolvlm": {"image_seq_len": 9},
        "idefics3": {"image_seq_len": 9},
        "mistral3": {
            "patch_size": 4, "spatial_merge_size": 2, "image_token": "[IMG]",
            "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]",
        },
    }.get(model_type, {})  # fmt: skip
