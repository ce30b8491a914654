"""Turns conversations into a model's input, and its output into answers, as lmms-eval's own classes do.

A conversation is a list of turns in the format of transformers' chat templates; images are PIL images.
"""

import re
from collections.abc import Sequence
from typing import Any

from PIL import Image

from atr.integrations.lmms_eval.images import pass_through_jpeg
from atr.integrations.lmms_eval.prompts import Prompt

Conversation = list[dict[str, Any]]
_THINKING_ENDS = "</think>"


def make_inputs(processor: Any, prompt: Prompt, conversations: Sequence[Conversation]) -> dict[str, Any]:
    """The processor's output for a batch of conversations, padded.

    Raises ValueError for an image that the class would refuse; other errors are the processor's.
    """
    conversations = [_prepare(conversation, prompt) for conversation in conversations]
    texts = [_text(processor, prompt, conversation) for conversation in conversations]
    images = [_images(conversation) for conversation in conversations]
    options: dict[str, Any] = {"images_kwargs": _image_options(prompt)} if prompt.images else {}
    if prompt.is_tokenized_once and _begins_itself(processor, texts[0]):
        options["add_special_tokens"] = False
    return dict(
        processor(
            text=texts,
            images=images if any(images) else None,
            padding=True,
            return_tensors="pt",
            **options,
        )
    )


def finish_answer(text: str, prompt: Prompt, until: str | Sequence[str]) -> str:
    """What counts of a decoded answer: behind its thoughts, and before the strings that end it."""
    if prompt.template.get("enable_thinking"):
        text = text.partition(_THINKING_ENDS)[2]
    elif prompt.is_instruct:
        text = text.rpartition(_THINKING_ENDS)[2]
    ends = [until] if isinstance(until, str) else until
    for end in ends if prompt.stops else ():
        if end and end not in prompt.spared:
            text = text.partition(end)[0]
    return text.strip()


def _prepare(conversation: Conversation, prompt: Prompt) -> Conversation:
    """The conversation with the class's system turn, images and wording."""
    system = (
        [{"role": "system", "content": [{"type": "text", "text": prompt.system}]}] if prompt.system else []
    )
    turns = [{**turn, "content": [_item(item, prompt) for item in turn["content"]]} for turn in conversation]
    return [*system, *turns]


def _item(item: dict[str, Any], prompt: Prompt) -> dict[str, Any]:
    if item["type"] == "image":
        return {**item, "image": _image(item["image"], prompt)}
    return {**item, "text": re.sub(prompt.dropped, "", item["text"])} if prompt.dropped else item


def _image(image: Image.Image, prompt: Prompt) -> Image.Image:
    if prompt.is_rgb:
        image = image.convert("RGB")
    if prompt.is_jpeg:
        image = pass_through_jpeg(image)
    return prompt.rounding.resize(image) if prompt.rounding else image


def _images(conversation: Conversation) -> list[Image.Image]:
    return [item["image"] for turn in conversation for item in turn["content"] if item["type"] == "image"]


def _image_options(prompt: Prompt) -> dict[str, Any]:
    """Keywords for images; bounds of pixels by the name that processors have for them."""
    options = dict(prompt.images)
    if "min_pixels" in options:
        options["size"] = {
            "shortest_edge": options.pop("min_pixels"),
            "longest_edge": options.pop("max_pixels"),
        }
    return options


def _text(processor: Any, prompt: Prompt, conversation: Conversation) -> str:
    if prompt.is_instruct and (images := _images(conversation)):
        return _instruct(processor.image_token, len(images), conversation)
    text: str = processor.apply_chat_template(
        conversation, tokenize=False, add_generation_prompt=True, **prompt.template
    )
    return text


def _instruct(image_token: str, images: int, conversation: Conversation) -> str:
    """Mistral's prompt with the images first, numbered if they are several."""
    question = "".join(item.get("text", "") for turn in conversation for item in turn["content"])
    shown = image_token if images == 1 else "".join(f"Image {n + 1}: {image_token}\n" for n in range(images))
    return f"<s>[INST]{shown}\n{question}[/INST]"


def _begins_itself(processor: Any, text: str) -> bool:
    """Whether the chat template wrote the token that the tokenizer would add."""
    begin = processor.tokenizer.bos_token
    return begin is not None and text.startswith(begin)
