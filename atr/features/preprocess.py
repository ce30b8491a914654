"""What an image processor makes of images, in a form that a manifest keeps and that compares exactly."""

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from PIL import Image

PROBE_SIZES = ((301, 96), (64, 210), (37, 20), (224, 224), (640, 427))
"""(width, height) of the probes: wide, tall, smaller than any tower reads, square, and a photograph's."""


def probe_image(width: int, height: int) -> Image.Image:
    """A picture of hard edges and fine detail in all channels, in which no two ways to resize agree."""
    y, x, channel = np.ogrid[:height, :width, :3]
    pixels = (x * x // 7 + 3 * y * (channel + 1) + 40 * channel + 90 * ((x // 5 + y // 3) % 2)) % 256
    return Image.fromarray(pixels.astype(np.uint8))


def describe_preprocessing(processor: Any) -> dict[str, Any]:
    """The settings of an image processor of transformers, and a hash of the pixels it makes of the probes.

    The hash alone decides whether two agree, whatever their classes and settings are called; the settings say
    to a reader in what they differ.
    """
    settings = json.loads(json.dumps(processor.to_dict(), default=str))
    return {
        "settings": {key: value for key, value in sorted(settings.items()) if value is not None},
        "pixels": _hash(lambda image: processor([image], return_tensors="np")["pixel_values"]),
    }


def explain_difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """In what two descriptions differ, empty where they make the same pixels of the same images."""
    if one["pixels"] == other["pixels"]:
        return ""
    theirs, ours = one["settings"], other["settings"]
    keys = sorted(key for key in {*theirs, *ours} if theirs.get(key) != ours.get(key))
    settings = [f"{key} {theirs.get(key)} and {ours.get(key)}" for key in keys]
    return ", ".join(settings) or "pixels, by the same settings"


def _hash(make: Callable[[Image.Image], Any]) -> str:
    digest = hashlib.sha256()
    for size in PROBE_SIZES:
        pixels = np.asarray(make(probe_image(*size)), dtype=np.float32)
        digest.update(f"{pixels.shape}".encode() + pixels.tobytes())
    return digest.hexdigest()
