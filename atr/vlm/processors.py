"""Loads the processor of a checkpoint, and says how it writes an image into a text.

Many processors have a part for videos that needs torchvision. Without it they are built for images alone.
"""

from collections.abc import Sequence
from copy import copy
from functools import cache
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import PROCESSOR_MAPPING, AutoConfig, AutoImageProcessor, AutoProcessor, AutoTokenizer, ProcessorMixin

from atr.core.hub import pretrained_arguments
from atr.features.encoder import first_line

_VIDEO = "video_processor"


def load_processor(path: str, kind: type | None = None) -> Any:
    """The processor of a folder or hub id, of class `kind` if one is given.

    Raises a one-line ValueError naming `path` if it cannot be read, or needs a package that is not installed.
    """
    arguments = pretrained_arguments(path)
    try:
        return (kind or AutoProcessor).from_pretrained(**arguments)
    except ImportError as error:
        return _load_for_images(path, error)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: no readable processor: {first_line(error)}") from error


def _load_for_images(path: str, missing: ImportError) -> Any:
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
        raise ValueError(f"{path}: its processor cannot be loaded: {first_line(reason)}") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: no readable processor: {first_line(error)}") from error


@cache
def _for_images(kind: Any) -> Any:
    """A processor class whose objects may lack the part for videos."""

    def check(self: Any, name: str, part: Any) -> Any:
        return None if name == _VIDEO and part is None else kind.check_argument_for_proper_class(self, name, part)

    # SmolVLM's own asks the part for videos in every chat.
    members = {
        "check_argument_for_proper_class": check,
        "apply_chat_template": ProcessorMixin.apply_chat_template,
    }
    return type(kind.__name__, (kind,), members)


def read_images(processor: Any, samples: Sequence[Sequence[Any]]) -> tuple[Any, list[str]]:
    """The processor's output for images, and the text that it writes for each image in place of its placeholder.

    The images of a sample stand in one prompt: a processor may cut or number them differently from single
    ones. The output is that for prompts of images alone.
    """
    written: list[str] = []
    recorder = copy(processor)

    def record(text: list[str], images_replacements: Sequence[str] = (), *rest: Any, **named: Any) -> Any:
        written.extend(images_replacements)
        return processor.get_text_with_replacements(text, images_replacements, *rest, **named)

    recorder.get_text_with_replacements = record
    texts = [processor.image_token * len(images) for images in samples]
    # Nested, because some processors treat the images of a sample with several differently.
    inputs = recorder(images=[list(images) for images in samples], text=texts, padding=True, return_tensors="pt")
    return inputs, written


def make_token_types(processor: Any, model: Any, ids_BL: Tensor) -> dict[str, Tensor]:
    """The token types of prompts that the model's `forward` names, as its processor makes them; (B, L) each."""
    ids = ids_BL.tolist()
    makers = {
        # Gemma's processor gives them the other name; PaliGemma's are 0 in a prompt.
        "token_type_ids": processor.create_mm_token_type_ids
        if getattr(processor, "return_mm_token_type_ids", False)
        else lambda rows: [[0] * len(row) for row in rows],
        "mm_token_type_ids": getattr(processor, "create_mm_token_type_ids", None),
        "moe_mm_token_type_ids": getattr(processor, "create_moe_mm_token_type_ids", None),
    }
    named = signature(type(model).forward).parameters
    return {
        name: torch.tensor(make(ids), device=ids_BL.device)
        for name, make in makers.items()
        if name in named and make is not None
    }
