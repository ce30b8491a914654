"""The frozen vision encoder: images in, one feature vector per patch or visual token out.

Shapes: see atr.core.tokens; N patches or tokens of an image, T tokens of the tower.
"""

import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
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
from atr.core.ragged import Grid
from atr.core.tower_layer import TowerLayer, check_layer
from atr.features.attention_hooks import CLASS_TOKENS, capture_attention, layers_to_run, leading_tokens
from atr.features.merged import PATCHES
from atr.features.pixel_values import NativePreprocessor, Preprocessor
from atr.features.vision_half import (
    PATCHES_PER_PASS,
    TOKEN_ENCODERS,
    NaflexTower,
    VisionHalf,
    check_patches,
    in_passes,
    makes_tokens,
    processor_settings,
    whole_grid,
    without_language_model,
)

# Prefix of the tower's weights in checkpoints that hold more (LLaVA, CLIP, SigLIP), in old and new layouts.
_TOWER_PREFIX = r"^(model\.)?(vision_tower\.)?(vision_model\.)?"

# Modules after the last layer: they do not affect hidden states, and many checkpoints lack them.
_UNUSED = ("pooler.", "head.")

_NAFLEX = "siglip2_vision_model"
_REFUSED = {
    "vit_mae": "shuffles the patches anew in each forward",
    "pixtral": "gives several images as one sequence",
    "data2vec-vision": "keeps its attention where no hook can read it",
}


@dataclass(frozen=True)
class TokenLayout:
    """Tokens of an image in the tower's order: class tokens, register tokens, patches."""

    grid: Grid | None
    """(rows, columns) of the patches; None if images have grids of their own."""
    class_tokens: int
    """Class tokens, before all others."""
    extra_tokens: int
    """Class and register tokens, before the patches."""
    width: int
    """Length D of a token."""


class Encoder(nn.Module):
    """A frozen vision encoder: a tower up to the layer that is read, or a model up to its merged tokens.

    `layer` is an index into `hidden_states`, like LLaVA's `vision_feature_layer`, or "merged". `preprocess`
    turns PIL images into pixel_values_BCHW, or into a dict of tensors if the encoder `is_ragged`. `options`
    are passed to every forward of the tower. `reader` runs the tower where its output is not one grid of
    patches.
    """

    def __init__(
        self,
        tower: PreTrainedModel,
        preprocess: Preprocessor | NativePreprocessor,
        layout: TokenLayout,
        name: str,
        layer: TowerLayer,
        options: Mapping[str, Any],
        reader: VisionHalf | NaflexTower | None = None,
    ) -> None:
        super().__init__()
        self.tower = tower
        self.reader = reader
        self.requires_grad_(False)
        self.eval()
        self.image_processor = preprocess.processor
        self.preprocess: Callable[[Sequence[Image.Image]], Any] = preprocess
        self.layout = layout
        self.name = name
        self.layer = layer
        self.options = options

    @classmethod
    def load(
        cls,
        path: str,
        layer: TowerLayer = -2,
        name: str | None = None,
        size: int | tuple[int, int] | None = None,
    ) -> Self:
        """Load the tower of a vision model, or of a model with a vision tower (LLaVA, CLIP, SigLIP).

        `path` is a folder, a hub id, or a hub id with a revision: `org/name@revision`. `size` in pixels, one
        side or (height, width), resizes the whole image and interpolates the tower's positions; with None the
        image processor of `path` decides. Layers after `layer` are neither loaded nor run.

        In a vision-language model that makes a token of several patches (a type in TOKEN_ENCODERS) a feature
        is a token: with `layer` "merged" as its language model is fed it, with an integer the mean of its
        patches after that layer. The language model is not loaded. Each image is encoded whole, even if the
        model would cut it into tiles.

        Raises ValueError naming the folder or file if it is missing or damaged, or if weights are missing, of
        another shape or not finite. Before any weight is read, raises it for a type of tower or model that is
        not supported, a layer that it lacks, and an image size that it does not accept.
        """
        config = _model_config(path)
        check_layer(layer)
        vision = getattr(config, "vision_config", config)
        if vision is not None and makes_tokens(config, layer):
            return cls._load_half(path, config, layer, name, size)
        _check_type(path, vision or config)
        if isinstance(layer, str):
            allowed = f"an int, or a model of type {', '.join(TOKEN_ENCODERS)}"
            raise ValueError(f"{path}: {config.model_type} has no {layer} tokens, allowed: {allowed}")
        vision.num_hidden_layers = layers_to_run(path, layer, vision.num_hidden_layers)
        prefix = None if vision is config else _TOWER_PREFIX
        if vision.model_type == _NAFLEX:
            return cls._load_naflex(path, vision, prefix, layer, name, size)
        preprocess = Preprocessor(load_image_processor(path, size))
        resized = size is not None and tuple(_pair(size)) != tuple(_pair(vision.image_size))
        options = {"interpolate_pos_encoding": True} if resized and _interpolates(vision) else {}
        layout = _measure(path, vision, preprocess, options)
        tower = _load_tower(path, vision, prefix)
        return cls(tower, preprocess, layout, name or path, layer, options)

    @classmethod
    def _load_half(
        cls, path: str, config: Any, layer: TowerLayer, name: str | None, size: int | tuple[int, int] | None
    ) -> Self:
        """Load tower and merger of a vision-language model."""
        vision, patches = config.vision_config, PATCHES[config.model_type]
        if isinstance(layer, int):
            layers_to_run(path, layer, vision.num_hidden_layers)
            width = getattr(vision, "embed_dim", vision.hidden_size)  # Qwen2-VL's hidden_size is the merger's
        else:
            width = config.get_text_config().hidden_size
        processor = _native_processor(path, size, processor_settings(config))
        check_patches(path, processor, vision)
        preprocess: Preprocessor | NativePreprocessor
        if patches.is_ragged:
            preprocess, grid = NativePreprocessor(processor), None
        else:
            preprocess = Preprocessor(processor)
            grid = whole_grid(path, _processed_size(path, preprocess), config)
        half = VisionHalf(
            _read_weights(without_language_model(MODEL_MAPPING[type(config)]), path, config, None), layer
        )
        return cls(half.tower, preprocess, TokenLayout(grid, 0, 0, width), name or path, layer, {}, half)

    @classmethod
    def _load_naflex(
        cls,
        path: str,
        config: Any,
        prefix: str | None,
        layer: int,
        name: str | None,
        size: int | tuple[int, int] | None,
    ) -> Self:
        """Load SigLIP 2's tower for images of any aspect ratio."""
        processor = _native_processor(path, size, {})
        check_patches(path, processor, config)
        tower = _load_tower(path, config, prefix)
        layout = TokenLayout(None, 0, 0, config.hidden_size)
        return cls(tower, NativePreprocessor(processor), layout, name or path, layer, {}, NaflexTower(tower))

    @property
    def is_ragged(self) -> bool:
        """Whether images have grids of their own."""
        return self.layout.grid is None

    @property
    def grid(self) -> Grid:
        """(rows, columns) of the features; raises ValueError if images have grids of their own."""
        if self.layout.grid is None:
            raise ValueError(f"{self.name}: has no one grid, as its images have grids of their own")
        return self.layout.grid

    @property
    def width(self) -> int:
        """Length D of a feature."""
        return self.layout.width

    def forward(self, pixel_values_BCHW: Tensor) -> Tensor:
        """features_BND at `layer`, without class and register tokens; not for a ragged encoder."""
        if self.reader is None:
            return self.states(pixel_values_BCHW)[-1]
        return torch.stack([features_ND for features_ND, _ in self.images(pixel_values_BCHW)])

    def images(self, inputs: Tensor | Mapping[str, Tensor]) -> list[tuple[Tensor, Grid]]:
        """features_ND and grid of each image, from what `preprocess` gives."""
        if isinstance(inputs, Tensor):
            if self.reader is None:
                return [(features_ND, self.grid) for features_ND in self(inputs)]
            inputs = {"pixel_values": inputs}
        assert self.reader is not None
        passes = in_passes(inputs, self.reader.side, PATCHES_PER_PASS)
        return [image for part in passes for image in self.reader(part)]

    def states(self, pixel_values_BCHW: Tensor) -> list[Tensor]:
        """Hidden states (B, N, D) of the patches after each layer, from the first to `layer`.

        Raises ValueError if features are not those of single patches in one grid.
        """
        if self.reader is not None:
            raise ValueError(f"{self.name}: has no states of single patches, allowed: a tower of one grid")
        states = self.tower(pixel_values_BCHW, output_hidden_states=True, **self.options).hidden_states
        return [state_BTD[:, self.layout.extra_tokens :] for state_BTD in states[1:]]

    def observe(self, pixel_values_BCHW: Tensor, needs: Collection[str]) -> dict[str, Tensor]:
        """features_BND, and the attention and keys of the same layer that `needs` names, by field name.

        `needs` and errors as in `atr.features.attention_hooks.capture_attention`; ValueError for any need if
        features are not those of single patches in one grid.
        """
        if self.reader is not None and needs:
            raise ValueError(f"{self.name}: {min(needs)} is not available, allowed: a tower of one grid")
        extra = self.layout.class_tokens, self.layout.extra_tokens
        with capture_attention(self.tower, -1, *extra, needs) as signals:
            features_BND = self(pixel_values_BCHW)
        return {"features_BND": features_BND, **signals}


def _model_config(path: str) -> PretrainedConfig:
    """The configuration of the checkpoint's model, of which the tower may be a part."""
    if split_revision(path)[0].count("/") > 1 and not Path(path).is_dir():
        raise ValueError(f"{path}: there is no such folder, and a hub id cannot have two slashes")
    try:
        return AutoConfig.from_pretrained(**pretrained_arguments(path))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: no readable model configuration: {first_line(error)}") from error


def _check_type(path: str, config: PretrainedConfig) -> None:
    """Refuse towers whose tokens are not known to be class tokens, registers and one grid of patches."""
    kind = config.model_type
    if kind not in CLASS_TOKENS and kind != _NAFLEX:
        reason = f", as it {_REFUSED[kind]}" if kind in _REFUSED else ""
        allowed = f"{', '.join([*CLASS_TOKENS, _NAFLEX])}, or in a model of type {', '.join(TOKEN_ENCODERS)}"
        raise ValueError(f"{path}: {kind} is not a supported vision tower{reason}, allowed: {allowed}")


def _native_processor(path: str, size: int | tuple[int, int] | None, settings: Mapping[str, Any]) -> Any:
    """The image processor of a model that accepts no other `size`."""
    if size is not None:
        raise ValueError(f"{path}: size: {size} is not allowed, allowed: that of its image processor")
    return load_image_processor(path, None, settings)


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
    return _read_weights(AutoModel, path, config, {prefix: ""} if prefix else None)


def _read_weights(
    cls: Any, path: str, config: PretrainedConfig, key_mapping: dict[str, str] | None
) -> PreTrainedModel:
    local = Path(path, "model.safetensors")
    weights = local if local.exists() else path
    try:
        with quiet():
            # Let transformers report weights of another shape, so that our own error can name them.
            model, report = cls.from_pretrained(
                **pretrained_arguments(path),
                config=config,
                key_mapping=key_mapping,
                dtype=torch.float32,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{weights}: no readable weights: {first_line(error)}") from error
    _refuse_incomplete(str(weights), report)
    used = {key: weight for key, weight in model.state_dict().items() if not key.startswith(_UNUSED)}
    check_finite_weights(used, str(weights))
    loaded: PreTrainedModel = model
    return loaded


def _refuse_incomplete(weights: str, report: dict[str, Any]) -> None:
    """Refuse missing weights, which would be random; unexpected ones belong to parts that are not used."""
    for key, stored, expected in sorted(report["mismatched_keys"]):
        raise ValueError(
            f"{weights}: {key} has shape {tuple(stored)}, its config.json needs {tuple(expected)}"
        )
    missing = sorted(key for key in report["missing_keys"] if not key.startswith(_UNUSED))
    if missing:
        raise ValueError(f"{weights}: lacks {len(missing)} weights of the vision tower, first {missing[0]}")


def load_image_processor(
    path: str, size: int | tuple[int, int] | None, settings: Mapping[str, Any] | None = None
) -> Any:
    """The image processor of a folder or hub id; `size` and errors as in `Encoder.load`.

    `settings` take the place of those in the folder.
    """
    changed = dict(settings or {})
    if size:
        height, width = _pair(size)
        changed |= {"size": {"height": height, "width": width}, "do_resize": True, "do_center_crop": False}
    try:
        with quiet():
            processor = AutoImageProcessor.from_pretrained(
                **pretrained_arguments(path), backend="pil", **changed
            )
    except ImportError as error:  # torchvision, for a processor that has no other form
        missing = first_line(error).partition(". ")[0]
        raise ValueError(f"{path}: no readable image processor: {missing}") from error
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
