"""The frozen vision tower: images in, one feature vector per patch out.

Shapes: see atr.core.tokens; N patches, T tokens of the tower.
"""

import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
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
from atr.features.pixel_values import Preprocessor

# Prefix of the tower's weights in checkpoints that hold more (LLaVA, CLIP, SigLIP), in old and new layouts.
_TOWER_PREFIX = r"^(model\.)?(vision_tower\.)?(vision_model\.)?"

# Modules after the last layer: they do not affect hidden states, and many checkpoints lack them.
_UNUSED = ("pooler.", "head.")


@dataclass(frozen=True)
class TokenLayout:
    """Tokens of an image in the tower's order: class tokens, register tokens, patches."""

    grid: tuple[int, int]
    """(rows, columns) of the patches."""
    class_tokens: int
    """Class tokens, before all others."""
    extra_tokens: int
    """Class and register tokens, before the patches."""
    width: int
    """Length D of a token."""


class Encoder(nn.Module):
    """A frozen vision tower, truncated after the layer whose output is read.

    `layer` is an index into `hidden_states`, like LLaVA's `vision_feature_layer`. `preprocess` turns PIL
    images into pixel_values_BCHW. `options` are passed to every forward of the tower.
    """

    def __init__(
        self,
        tower: PreTrainedModel,
        preprocess: Preprocessor,
        layout: TokenLayout,
        name: str,
        layer: int,
        options: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.tower = tower.requires_grad_(False)
        self.eval()
        self.image_processor = preprocess.processor
        self.preprocess = preprocess
        self.layout = layout
        self.name = name
        self.layer = layer
        self.options = options

    @classmethod
    def load(
        cls, path: str, layer: int = -2, name: str | None = None, size: int | tuple[int, int] | None = None
    ) -> Self:
        """Load the tower of a vision model, or of a model with a vision tower (LLaVA, CLIP, SigLIP).

        `path` is a folder, a hub id, or a hub id with a revision: `org/name@revision`. `size` in pixels, one
        side or (height, width), resizes the whole image and interpolates the tower's positions; with None the
        image processor of `path` decides. Layers after `layer` are neither loaded nor run.

        Raises ValueError naming the folder or file if it is missing or damaged, or if weights are missing, of
        another shape or not finite. Before any weight is read, raises it for a type of tower that is not in
        CLASS_TOKENS, a layer that the tower lacks, and an image size that it does not accept.
        """
        config, prefix = _vision_config(path)
        _check_type(path, config)
        config.num_hidden_layers = layers_to_run(path, layer, config.num_hidden_layers)
        preprocess = Preprocessor(load_image_processor(path, size))
        resized = size is not None and tuple(_pair(size)) != tuple(_pair(config.image_size))
        options = {"interpolate_pos_encoding": True} if resized and _interpolates(config) else {}
        layout = _measure(path, config, preprocess, options)
        tower = _load_tower(path, config, prefix)
        return cls(tower, preprocess, layout, name or path, layer, options)

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of the patch tokens."""
        return self.layout.grid

    @property
    def width(self) -> int:
        """Length D of a feature."""
        return self.layout.width

    def forward(self, pixel_values_BCHW: Tensor) -> Tensor:
        """features_BND of the patches at `layer`, without class and register tokens."""
        return self.states(pixel_values_BCHW)[-1]

    def states(self, pixel_values_BCHW: Tensor) -> list[Tensor]:
        """Hidden states (B, N, D) of the patches after each layer, from the first to `layer`."""
        states = self.tower(pixel_values_BCHW, output_hidden_states=True, **self.options).hidden_states
        return [state_BTD[:, self.layout.extra_tokens :] for state_BTD in states[1:]]

    def observe(self, pixel_values_BCHW: Tensor, needs: Collection[str]) -> dict[str, Tensor]:
        """features_BND, and the attention and keys of the same layer that `needs` names, by field name.

        `needs` and errors as in `atr.features.attention_hooks.capture_attention`.
        """
        extra = self.layout.class_tokens, self.layout.extra_tokens
        with capture_attention(self.tower, -1, *extra, needs) as signals:
            features_BND = self(pixel_values_BCHW)
        return {"features_BND": features_BND, **signals}


def _vision_config(path: str) -> tuple[PretrainedConfig, str | None]:
    """The tower's configuration, and the prefix of its weights if the checkpoint holds more."""
    if split_revision(path)[0].count("/") > 1 and not Path(path).is_dir():
        raise ValueError(f"{path}: there is no such folder, and a hub id cannot have two slashes")
    try:
        config = AutoConfig.from_pretrained(**pretrained_arguments(path))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: no readable model configuration: {first_line(error)}") from error
    if hasattr(config, "vision_config"):
        return config.vision_config, _TOWER_PREFIX
    return config, None


def _check_type(path: str, config: PretrainedConfig) -> None:
    """Refuse towers whose tokens are not known to be class tokens, registers and one grid of patches."""
    if config.model_type == "siglip2_vision_model":
        raise ValueError(
            f"{path}: SigLIP 2 NaFlex gives every image its own grid, allowed: checkpoints of a fixed "
            "resolution, such as siglip2-so400m-patch14-384"
        )
    if config.model_type not in CLASS_TOKENS:
        raise ValueError(
            f"{path}: {config.model_type} is not a supported vision tower, allowed: {', '.join(CLASS_TOKENS)}"
        )


def layers_to_run(path: str, layer: int, depth: int) -> int:
    """Number of layers to run to get `layer` of `depth`; raises ValueError naming `path` if out of range."""
    if layer == 0 or not -depth <= layer <= depth:
        raise ValueError(f"{path}: there is no layer {layer}, allowed: 1 to {depth}, or -{depth} to -1")
    return int(layer if layer > 0 else depth + 1 + layer)


def _interpolates(config: PretrainedConfig) -> bool:
    """Whether the tower's forward takes `interpolate_pos_encoding`; DINOv2 interpolates without it."""
    return "interpolate_pos_encoding" in signature(MODEL_MAPPING[type(config)].forward).parameters


@torch.inference_mode()
def _measure(
    path: str, config: PretrainedConfig, preprocess: Preprocessor, options: dict[str, Any]
) -> TokenLayout:
    """Measure the token layout by running one layer on torch's meta device, without reading weights.

    The image size is the processor's, which may differ from the configuration's and may not fit the tower.
    """
    height, width = _processed_size(path, preprocess)
    shallow = deepcopy(config)
    shallow.num_hidden_layers = 1
    with torch.device("meta"):
        tower = AutoModel.from_config(shallow)
        pixel_values_BCHW = torch.empty(1, config.num_channels, height, width)
    try:
        states = tower(pixel_values_BCHW, output_hidden_states=True, **options).hidden_states
    except (ValueError, RuntimeError) as error:  # raised by CLIP and by SigLIP
        raise ValueError(
            f"{path}: the tower refuses the {height} x {width} pixels that its image processor gives, "
            f"allowed: {config.image_size}: {first_line(error)}"
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


def _processed_size(path: str, preprocess: Preprocessor) -> tuple[int, int]:
    """(height, width) of every image after the processor; raises ValueError if it depends on the image."""
    wide, tall = (preprocess([Image.new("RGB", sides)]).shape[-2:] for sides in ((96, 64), (64, 96)))
    if wide != tall:
        raise ValueError(
            f"{path}: its image processor gives images of different shapes different sizes, {tuple(wide)} "
            f"and {tuple(tall)}, allowed: one size for all"
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
            # Let transformers report weights of another shape, so that our own error can name them.
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
    used = {key: weight for key, weight in tower.state_dict().items() if not key.startswith(_UNUSED)}
    check_finite_weights(used, str(weights))
    return tower


def _refuse_incomplete(weights: str, report: dict[str, Any]) -> None:
    """Refuse missing weights, which would be random; unexpected ones belong to parts that are not used."""
    for key, stored, expected in sorted(report["mismatched_keys"]):
        raise ValueError(
            f"{weights}: {key} has shape {tuple(stored)}, its config.json needs {tuple(expected)}"
        )
    missing = sorted(key for key in report["missing_keys"] if not key.startswith(_UNUSED))
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
    """Print a warning if the processor is not the torchvision one that the checkpoint names."""
    settings, _ = type(processor).get_image_processor_dict(**pretrained_arguments(path))
    named = settings.get("image_processor_type", "")
    used = type(processor).__name__
    # A name without `Fast` may mean either class.
    if named.endswith("Fast") and used.endswith("Pil"):
        print(f"{path}: {named} needs torchvision, using {used} instead", file=sys.stderr)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bars and its report of unused weights; callers check the report."""
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
    """First line of an error of transformers; the other lines are advice."""
    return str(error).strip().split("\n", 1)[0]
