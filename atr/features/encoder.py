"""The frozen vision tower: images in, one feature vector per patch out.

Shapes: B images, N patch tokens in raster order, D width of the tower.
"""

import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from atr.core.finite import check_finite_weights
from atr.core.hub import pretrained_arguments, split_revision
from atr.features.attention_hooks import CLASS_TOKENS, capture_attention, leading_tokens

Preprocess = Callable[[Sequence[Image.Image]], Tensor]

# Where checkpoints that hold more than the tower (LLaVA, CLIP, SigLIP) keep it, old and new layouts.
_TOWER_PREFIX = r"^(model\.)?(vision_tower\.)?(vision_model\.)?"

# Modules after the last layer: hidden states do not pass through them, and many checkpoints leave them out.
_UNREAD = ("pooler.", "head.")


@dataclass(frozen=True)
class TokenLayout:
    """The tokens of an image as the tower orders them: class tokens, register tokens, patches."""

    grid: tuple[int, int]
    """(rows, columns) of the patches."""
    class_tokens: int
    """Those that stand for the whole image: 0 or 1."""
    extra_tokens: int
    """Tokens before the patches: class and register tokens."""
    width: int
    """Length D of a token."""


class Encoder(nn.Module):
    """A frozen vision tower cut off after the layer that is read.

    `layer` is the index into `hidden_states` as LLaVA's `vision_feature_layer` counts it. `preprocess` turns
    PIL images into pixel_values_BCHW; it pickles without the tower, so that loader workers stay small.
    `options` go to every forward of the tower.
    """

    def __init__(
        self,
        tower: PreTrainedModel,
        image_processor: Any,
        layout: TokenLayout,
        name: str,
        layer: int,
        options: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.tower = tower.requires_grad_(False)
        self.eval()
        self.image_processor = image_processor
        self.preprocess: Preprocess = partial(_pixel_values, image_processor)
        self.layout = layout
        self.name = name
        self.layer = layer
        self.options = options

    @classmethod
    def load(
        cls, path: str, layer: int = -2, name: str | None = None, size: int | tuple[int, int] | None = None
    ) -> Self:
        """Load the tower of a folder or hub id: a vision model, or one that holds one (LLaVA, CLIP, SigLIP).

        Behind a hub id there may be a revision: `org/name@revision`.

        `size` in pixels, one side or (height, width), resizes the whole image to it and interpolates the
        tower's positions; None leaves both to the folder's image processor. Layers behind `layer` are neither
        loaded nor run. Raises ValueError naming the folder or file for anything that is not there, is
        damaged, or has weights missing, misshapen or not finite; and before any weight is read, for a tower
        of a type that is not in CLASS_TOKENS, for a layer it lacks and an image size it cannot take.
        """
        config, prefix = _vision_config(path)
        _check_type(path, config)
        config.num_hidden_layers = layers_to_run(path, layer, config.num_hidden_layers)
        processor = load_image_processor(path, size)
        resized = size is not None and tuple(_pair(size)) != tuple(_pair(config.image_size))
        options = {"interpolate_pos_encoding": True} if resized and _interpolates(config) else {}
        layout = _measure(path, config, partial(_pixel_values, processor), options)
        tower = _load_tower(path, config, prefix)
        return cls(tower, processor, layout, name or path, layer, options)

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of the patch tokens."""
        return self.layout.grid

    @property
    def width(self) -> int:
        """Length D of a feature."""
        return self.layout.width

    def forward(self, pixel_values_BCHW: Tensor) -> Tensor:
        """features_BND of the patches at `layer`; class and register tokens are left out."""
        return self.states(pixel_values_BCHW)[-1]

    def states(self, pixel_values_BCHW: Tensor) -> list[Tensor]:
        """The patches at every layer that is run, (B, N, D) each: the first layer's, and so on to `layer`."""
        states = self.tower(pixel_values_BCHW, output_hidden_states=True, **self.options).hidden_states
        return [state_BTD[:, self.layout.extra_tokens :] for state_BTD in states[1:]]

    def observe(self, pixel_values_BCHW: Tensor, needs: Collection[str]) -> dict[str, Tensor]:
        """features_BND of `forward`, and what `needs` names of the attention and keys at the same layer.

        The keys are the fields of a reducer's input, `needs` a reducer's own: those of
        `atr.features.attention_hooks.observing`, ValueError for others.
        """
        extra = self.layout.class_tokens, self.layout.extra_tokens
        with capture_attention(self.tower, -1, *extra, needs) as seen:
            features_BND = self(pixel_values_BCHW)
        return {"features_BND": features_BND, **seen}


def _vision_config(path: str) -> tuple[PretrainedConfig, str | None]:
    """The tower's own configuration, and the prefix of its weights where the checkpoint holds more."""
    if split_revision(path)[0].count("/") > 1 and not Path(path).is_dir():
        raise ValueError(f"{path}: there is no such folder, and no hub id has two slashes")
    try:
        config = AutoConfig.from_pretrained(**pretrained_arguments(path))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: no readable model configuration: {first_line(error)}") from error
    if hasattr(config, "vision_config"):
        return config.vision_config, _TOWER_PREFIX
    return config, None


def _check_type(path: str, config: PretrainedConfig) -> None:
    """Refuse towers whose tokens are not known to be a class token, registers and one grid of patches."""
    if config.model_type == "siglip2_vision_model":
        raise ValueError(
            f"{path}: SigLIP 2 NaFlex gives every image a grid of its own, allowed: its checkpoints of one "
            "resolution, as siglip2-so400m-patch14-384"
        )
    if config.model_type not in CLASS_TOKENS:
        raise ValueError(
            f"{path}: {config.model_type} is no vision tower known here, allowed: {', '.join(CLASS_TOKENS)}"
        )


def layers_to_run(path: str, layer: int, depth: int) -> int:
    """How many of the `depth` layers of a tower give `layer`; raises ValueError naming `path` if none do."""
    if layer == 0 or not -depth <= layer <= depth:
        raise ValueError(f"{path}: there is no layer {layer}, allowed: 1 to {depth}, or -{depth} to -1")
    return int(layer if layer > 0 else depth + 1 + layer)


def _interpolates(config: PretrainedConfig) -> bool:
    """Whether the tower has to be told to interpolate its positions; DINOv2 does where it must."""
    return "interpolate_pos_encoding" in signature(MODEL_MAPPING[type(config)].forward).parameters


@torch.inference_mode()
def _measure(
    path: str, config: PretrainedConfig, preprocess: Preprocess, options: dict[str, Any]
) -> TokenLayout:
    """Run one layer of the tower on torch's meta device, which knows shapes alone, so that no weight is read.

    The processor, not the configuration, decides how large images arrive; the tower whether it takes them.
    """
    height, width = _arriving_size(path, preprocess)
    shallow = deepcopy(config)
    shallow.num_hidden_layers = 1
    with torch.device("meta"):
        tower = AutoModel.from_config(shallow)
        pixel_values_BCHW = torch.empty(1, config.num_channels, height, width)
    try:
        states = tower(pixel_values_BCHW, output_hidden_states=True, **options).hidden_states
    except (ValueError, RuntimeError) as error:  # what CLIP raises, and what SigLIP does
        raise ValueError(
            f"{path}: the tower refuses its own processor's images of {height} x {width} pixels, "
            f"its own are {config.image_size}: {first_line(error)}"
        ) from error
    class_tokens, extra_tokens = leading_tokens(config)
    rows, columns = (
        side // patch for side, patch in zip((height, width), _pair(config.patch_size), strict=True)
    )
    if states[-1].shape[1] != extra_tokens + rows * columns:
        raise ValueError(
            f"{path}: {states[-1].shape[1]} tokens are not {extra_tokens} and {rows} x {columns} patches"
        )
    return TokenLayout((rows, columns), class_tokens, extra_tokens, states[-1].shape[-1])


def _arriving_size(path: str, preprocess: Preprocess) -> tuple[int, int]:
    """(height, width) of what the processor makes of any image."""
    wide, tall = (preprocess([Image.new("RGB", sides)]).shape[-2:] for sides in ((96, 64), (64, 96)))
    if wide != tall:
        raise ValueError(
            f"{path}: its processor gives images of different shapes different sizes, {tuple(wide)} and "
            f"{tuple(tall)}, allowed: one size for all"
        )
    height, width = wide
    return height, width


def _pair(sides: int | Sequence[int]) -> Sequence[int]:
    return (sides, sides) if isinstance(sides, int) else sides


def _load_tower(path: str, config: PretrainedConfig, prefix: str | None) -> PreTrainedModel:
    local = Path(path, "model.safetensors")
    weights = local if local.exists() else path
    try:
        with quiet():
            # Misshapen weights are reported rather than raised, so that the message can name them.
            tower, report = AutoModel.from_pretrained(
                **pretrained_arguments(path),
                config=config,
                key_mapping={prefix: ""} if prefix else None,
                dtype=torch.float32,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{weights}: no readable weights: {first_line(error)}") from error
    _refuse_incomplete(str(weights), report)
    read = {key: weight for key, weight in tower.state_dict().items() if not key.startswith(_UNREAD)}
    check_finite_weights(read, str(weights))
    return tower


def _refuse_incomplete(weights: str, report: dict[str, Any]) -> None:
    """Unexpected weights are the parts and layers that are not read; missing ones would be random numbers."""
    for key, found, wanted in sorted(report["mismatched_keys"]):
        raise ValueError(f"{weights}: {key} has shape {tuple(found)}, its config.json wants {tuple(wanted)}")
    missing = sorted(key for key in report["missing_keys"] if not key.startswith(_UNREAD))
    if missing:
        raise ValueError(f"{weights}: lacks {len(missing)} weights of the vision tower, first {missing[0]}")


def load_image_processor(path: str, size: int | tuple[int, int] | None) -> Any:
    """The image processor of a folder or hub id; `size` and errors as in `Encoder.load`."""
    resized: dict[str, Any] = {}
    if size:
        height, width = _pair(size)
        resized = {"size": {"height": height, "width": width}, "do_resize": True, "do_center_crop": False}
    try:
        with quiet():
            processor = AutoImageProcessor.from_pretrained(
                **pretrained_arguments(path), backend="pil", **resized
            )
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: no readable image processor: {first_line(error)}") from error
    warn_of_substitute(path, processor)
    return processor


def warn_of_substitute(path: str, processor: Any) -> None:
    """Say so where another image processor was taken than the one that the folder asks torchvision for."""
    written, _ = type(processor).get_image_processor_dict(**pretrained_arguments(path))
    asked = written.get("image_processor_type", "")
    used = type(processor).__name__
    # The name without `Fast` is written for both: it asks for neither.
    if asked.endswith("Fast") and used.endswith("Pil"):
        print(f"{path}: {asked} needs torchvision, {used} takes its place", file=sys.stderr)


def _pixel_values(processor: Any, images: Sequence[Image.Image]) -> Tensor:
    pixel_values_BCHW: Tensor = processor(list(images), return_tensors="pt")["pixel_values"]
    if pixel_values_BCHW.ndim != 4:
        raise ValueError(f"{type(processor).__name__} cuts images into tiles: name the vision tower itself")
    return pixel_values_BCHW


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' report of unread weights and its bars; what matters of it is raised here."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def first_line(error: Exception) -> str:
    """What an error of transformers says first; more lines are advice."""
    return str(error).strip().split("\n", 1)[0]
