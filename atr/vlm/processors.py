"""Loads the processor of a checkpoint, and says how it writes an image into a text.

Many processors have a part for videos that needs torchvision. Without it they are built for images alone.
"""

from collections.abc import Sequence
from copy import copy
from functools import cache
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import (
    PROCESSOR_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    ProcessorMixin,
)

from atr.core.hub import pretrained_arguments
from atr.features.encoder import first_line
from atr.vlm.sequence import token_types

_VIDEO = "video_processor"


def load_processor(path: str, kind: Any = None) -> Any:
    """The processor of a folder or hub id, of class `kind` if one is given.

    Raises a one-line ValueError naming `path` if it cannot be read, or needs a package that is not installed.
    """
    arguments = pretrained_arguments(path)
    try:
        return (kind or AutoProcessor).from_pretrained(**arguments)
    except (OSError, ValueError, ImportError) as error:
        if _lacks_package(error):
            return _load_for_images(path, error)
        raise ValueError(f"{path}: no readable processor: {first_line(error)}") from error


def _lacks_package(error: Exception) -> bool:
    return isinstance(error, ImportError) or "torchvision" in str(error).lower()


def _load_for_images(path: str, missing: Exception) -> Any:
    """The processor without its part for videos; `missing` says why the whole could not be loaded."""
    arguments = pretrained_arguments(path)
    try:
        kind = _for_images(PROCESSOR_MAPPING[type(AutoConfig.from_pretrained(**arguments))])
        parts = {
            "image_processor": AutoImageProcessor.from_pretrained(**arguments),
            "tokenizer": AutoTokenizer.from_pretrained(**arguments),
        }
        settings, _ = kind.get_processor_dict(**arguments)
        return kind.from_args_and_dict([parts.get(name) for name in kind.get_attributes()], settings)
    # A processor may read its part for videos when it is made.
    except (ImportError, AttributeError, TypeError, KeyError) as error:
        reason = error if isinstance(error, ImportError) else missing
        needed = "torchvision" if "torchvision" in str(reason).lower() else first_line(reason)
        raise ValueError(f"{path}: its processor lacks a package that it needs: {needed}") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: no readable processor: {first_line(error)}") from error


@cache
def _for_images(kind: Any) -> Any:
    """A processor class whose objects may lack the part for videos."""

    def check(self: Any, name: str, part: Any) -> Any:
        is_left_out = name == _VIDEO and part is None
        return None if is_left_out else kind.check_argument_for_proper_class(self, name, part)

    # SmolVLM's own asks the part for videos in every chat.
    members = {
        "check_argument_for_proper_class": check,
        "apply_chat_template": ProcessorMixin.apply_chat_template,
    }
    return type(kind.__name__, (kind,), members)


def read_images(
    processor: Any, samples: Sequence[Sequence[Any]], texts: Sequence[str], **options: Any
) -> tuple[Any, list[str]]:
    """The processor's output for samples of images, and the text that it writes for each in a prompt.

    `texts` hold one placeholder per image of their sample. The images of a sample stand in one prompt,
    because a processor may cut or number them differently from single ones. No texts are returned by a
    processor that does not write them by `get_text_with_replacements`, as those of transformers do.
    """
    written: list[str] = []
    recorder = copy(processor)

    def record(text: list[str], images_replacements: Sequence[str] = (), *rest: Any, **named: Any) -> Any:
        written.extend(images_replacements)
        return processor.get_text_with_replacements(text, images_replacements, *rest, **named)

    recorder.get_text_with_replacements = record
    # Nested, so that a sample with several images is known for one.
    images = [list(images) for images in samples]
    return recorder(images=images, text=list(texts), **options), written


def count_image_tokens(processor: Any, sizes: Sequence[tuple[int, int]]) -> list[int]:
    """Tokens that the processor writes for images of the given (height, width), tags included, at most."""
    if hasattr(processor, "_get_num_multimodal_tokens"):  # which serving frameworks ask, too
        counts = processor._get_num_multimodal_tokens(image_sizes=list(sizes))["num_image_tokens"]
        return list(map(int, counts))
    known: dict[tuple[int, int], int] = {}
    for height, width in set(sizes):
        _, written = read_images(
            processor, [[Image.new("RGB", (width, height))]], [processor.image_token], return_tensors="pt"
        )
        known[height, width] = len(processor.tokenizer(written[0], add_special_tokens=False)["input_ids"])
    return [known[size] for size in sizes]


def make_token_types(processor: Any, model: Any, ids_BL: Tensor) -> dict[str, Tensor]:
    """The token types of prompts that the model reads, as its processor makes them; (B, L) each."""
    makers = {
        # Gemma's processor gives them the other name; PaliGemma's are 0 in a prompt.
        "token_type_ids": "create_mm_token_type_ids" if _marks_images(processor) else None,
        "mm_token_type_ids": "create_mm_token_type_ids",
        "moe_mm_token_type_ids": "create_moe_mm_token_type_ids",
    }
    ids, made = ids_BL.tolist(), {}
    for name in sorted(token_types(model)):
        maker = makers[name]
        types = getattr(processor, maker)(ids) if maker else [[0] * len(row) for row in ids]
        made[name] = torch.tensor(types, device=ids_BL.device)
    return made


def _marks_images(processor: Any) -> bool:
    return bool(getattr(processor, "return_mm_token_type_ids", False))
