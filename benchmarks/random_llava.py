"""A LLaVA-1.5 or LLaVA-NeXT of random weights, written as a folder that transformers loads."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

WORDS = tuple(f"word{index}" for index in range(1000))
_SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
_IMAGE, _PATCH = 336, 14
_TEMPLATE = (
    "{% for message in messages %}USER: {% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for item in message['content'] %}"
    "{% if item['type'] == 'image' %}<image>\n{% else %}{{ item['text'] }}{% endif %}"
    "{% endfor %}{% endif %} ASSISTANT:{% endfor %}"
)
"""Takes a message as text, as lmms-eval gives it, and as a list of parts."""
_FAMILIES: dict[str, tuple[Any, Any, Any, Any]] = {
    "llava": (LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor, CLIPImageProcessorPil),
    "llava_next": (
        LlavaNextConfig, LlavaNextForConditionalGeneration, LlavaNextProcessor, LlavaNextImageProcessorPil,
    ),
}  # fmt: skip


def write_random_llava(folder: Path, family: str, width: int = 512, layers: int = 10) -> int:
    """Write model and processor of a family, "llava" or "llava_next"; return the language model's parameters.

    The tower reads 336 x 336 pixels in patches of 14; with 1.9M parameters it is as small beside the default
    language model as CLIP-L is beside 7B. `width` is a multiple of 64. No answer ends early: the end token's
    logit is zero, and some word's is higher.
    """
    _, _, make_processor, make_image_processor = _FAMILIES[family]
    model = make_random_llava(family, width, layers)
    model.save_pretrained(folder)
    size = {"size": {"shortest_edge": _IMAGE}, "crop_size": {"height": _IMAGE, "width": _IMAGE}}
    processor = make_processor(
        make_image_processor(**size),
        _tokenizer(),
        patch_size=_PATCH,
        vision_feature_select_strategy="default",
        chat_template=_TEMPLATE,
        num_additional_image_tokens=1,
    )
    processor.save_pretrained(folder)
    return sum(weight.numel() for weight in model.model.language_model.parameters())


def make_random_llava(family: str, width: int = 512, layers: int = 10) -> Any:
    """The model alone, in evaluation mode."""
    make_config, kind, _, _ = _FAMILIES[family]
    torch.manual_seed(0)
    parts = {"vision_config": _tower(), "text_config": _language(width, layers)}
    model = kind(make_config(**parts, image_token_index=_SPECIAL.index("<image>"))).eval()
    with torch.no_grad():
        model.lm_head.weight[: len(_SPECIAL)] = 0
    return model


def _tower() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=3,
        image_size=_IMAGE,
        patch_size=_PATCH,
    )


def _language(width: int, layers: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(_SPECIAL) + len(WORDS),
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        max_position_embeddings=8192,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def _tokenizer() -> PreTrainedTokenizerFast:
    """One token per word between spaces."""
    vocabulary = {word: index for index, word in enumerate((*_SPECIAL, *WORDS))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        chat_template=_TEMPLATE,
    )
