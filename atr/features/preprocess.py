"""Exact comparison of image processors, by their settings and a hash of their pixels of probe images."""

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from PIL import Image

PROBE_SIZES = ((301, 96), (64, 210), (37, 20), (224, 224), (640, 427))
"""(width, height) of the probe images: wide, tall, smaller than any tower's input, square, a photograph's."""


def probe_image(width: int, height: int) -> Image.Image:
    """A picture with hard edges and fine detail in all channels, on which any two resizing methods differ."""
    y, x, channel = np.ogrid[:height, :width, :3]
    pixels = (x * x // 7 + 3 * y * (channel + 1) + 40 * channel + 90 * ((x // 5 + y // 3) % 2)) % 256
    return Image.fromarray(pixels.astype(np.uint8))


def describe_preprocessing(processor: Any) -> dict[str, Any]:
    """Settings of a transformers image processor and a hash of its pixels of the probe images; JSON.

    Two processors agree if their hashes do, whatever their classes and settings; the settings only explain a
    difference to the reader.
    """
    settings = json.loads(json.dumps(processor.to_dict(), default=str))
    return {
        "settings": {key: value for key, value in sorted(settings.items()) if value is not None},
        "pixels": _hash_probes(lambda image: processor([image], return_tensors="np")["pixel_values"]),
    }


def explain_difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Settings in which two descriptions differ, as text; empty if both give the same pixels."""
    if one["pixels"] == other["pixels"]:
        return ""
    first, second = one["settings"], other["settings"]
    keys = sorted(key for key in {*first, *second} if first.get(key) != second.get(key))
    settings = [f"{key} {first.get(key)} and {second.get(key)}" for key in keys]
    return ", ".join(settings) or "pixels, with the same settings"


def _hash_probes(process: Callable[[Image.Image], Any]) -> str:
    digest = hashlib.sha256()
    for size in PROBE_SIZES:
        pixels = np.asarray(process(probe_image(*size)), dtype=np.float32)
        digest.update(f"{pixels.shape}".encode() + pixels.tobytes())
    return digest.hexdigest()
