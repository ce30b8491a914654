"""The frozen vision tower: images in, one feature vector per patch out.

Shapes: B images, N patch tokens in raster order, D width of the tower.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.utils import logging

Preprocess = Callable[[Sequence[Image.Image]], Tensor]

# Where checkpoints that hold more than the tower (LLaVA, CLIP, SigLIP) keep it, old and new layouts.
_TOWER_PREFIX = r"^(model\.)?(vision_tower\.)?(vision_model\.)?"

# Modules after the last layer: hidden states do not pass through them, and many checkpoints leave them out.
_UNREAD = ("pooler.", "head.")


class Encoder(nn.Module):
    """A frozen vision tower cut off after the layer that is read.

    `grid` is (rows, columns) of the patch tokens, `width` the length D of a feature, `layer` the index into
    `hidden_states` as LLaVA's `vision_feature_layer` counts it. `preprocess` turns PIL images into
    pixel_values_BCHW; it pickles without the tower, so that loader workers stay small.
    """

    def __init__(self, tower: PreTrainedModel, preprocess: Preprocess, name: str, layer: int) -> None:
        super().__init__()
        self.tower = tower.requires_grad_(False)
        self.eval()
        self.preprocess = preprocess
        self.name = name
        self.layer = layer
        self.grid, self.extra_tokens, self.width = self._measure()

    @classmethod
    def load(cls, path: str, layer: int = -2, name: str | None = None) -> Self:
        """Load the tower of a folder or hub id: a vision model, or one that holds one (LLaVA, CLIP, SigLIP).

        Layers behind `layer` are neither loaded nor run. Raises ValueError naming the folder or file for
        anything that is not there, is damaged, has weights missing or misshapen, or has no such layer.
        """
        config, prefix = _vision_config(path)
        config.num_hidden_layers = _layers_to_run(path, layer, config)
        tower = _load_tower(path, config, prefix)
        return cls(tower, partial(_pixel_values, _load_processor(path)), name or path, layer)

    def forward(self, pixel_values_BCHW: Tensor) -> Tensor:
        """features_BND of the patches at `layer`; class and register tokens are left out."""
        states = self.tower(pixel_values_BCHW, output_hidden_states=True).hidden_states
        features_BND: Tensor = states[-1][:, self.extra_tokens :]
        return features_BND

    @torch.inference_mode()
    def _measure(self) -> tuple[tuple[int, int], int, int]:
        """Encode one blank image: the processor, not the configuration, decides how large images arrive."""
        config = self.tower.config
        pixel_values_BCHW = self.preprocess([Image.new("RGB", (config.image_size, config.image_size))])
        rows, columns = (side // config.patch_size for side in pixel_values_BCHW.shape[-2:])
        try:
            states = self.tower(pixel_values_BCHW, output_hidden_states=True).hidden_states
        except ValueError as error:  # e.g. the processor's size is not the tower's
            raise ValueError(f"{self.name}: the tower refuses its own processor's images: {error}") from error
        extra_tokens = states[-1].shape[1] - rows * columns
        if extra_tokens < 0:
            raise ValueError(f"{self.name}: not a plain vision transformer: fewer tokens than patches")
        return (rows, columns), extra_tokens, states[-1].shape[-1]


def _vision_config(path: str) -> tuple[PretrainedConfig, str | None]:
    """The tower's own configuration, and the prefix of its weights where the checkpoint holds more."""
    if path.count("/") > 1 and not Path(path).is_dir():
        raise ValueError(f"{path}: there is no such folder, and no hub id has two slashes")
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: no readable model configuration: {_first_line(error)}") from error
    if hasattr(config, "vision_config"):
        return config.vision_config, _TOWER_PREFIX
    return config, None


def _layers_to_run(path: str, layer: int, config: PretrainedConfig) -> int:
    depth = getattr(config, "num_hidden_layers", None)
    if depth is None or not isinstance(getattr(config, "patch_size", None), int):
        raise ValueError(f"{path}: {config.model_type} is not a plain vision transformer")
    if layer == 0 or not -depth <= layer <= depth:
        raise ValueError(f"{path}: there is no layer {layer}, allowed: 1 to {depth}, or -{depth} to -1")
    return int(layer if layer > 0 else depth + 1 + layer)


def _load_tower(path: str, config: PretrainedConfig, prefix: str | None) -> PreTrainedModel:
    local = Path(path, "model.safetensors")
    weights = local if local.exists() else path
    try:
        with _quiet():
            # Misshapen weights are reported rather than raised, so that the message can name them.
            tower, report = AutoModel.from_pretrained(
                path,
                config=config,
                key_mapping={prefix: ""} if prefix else None,
                dtype=torch.float32,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{weights}: no readable weights: {_first_line(error)}") from error
    _refuse_incomplete(str(weights), report)
    return tower


def _refuse_incomplete(weights: str, report: dict[str, Any]) -> None:
    """Unexpected weights are the parts and layers that are not read; missing ones would be random numbers."""
    for key, found, wanted in sorted(report["mismatched_keys"]):
        raise ValueError(f"{weights}: {key} has shape {tuple(found)}, its config.json wants {tuple(wanted)}")
    missing = sorted(key for key in report["missing_keys"] if not key.startswith(_UNREAD))
    if missing:
        raise ValueError(f"{weights}: lacks {len(missing)} weights of the vision tower, first {missing[0]}")


def _load_processor(path: str) -> Any:
    try:
        with _quiet():
            return AutoImageProcessor.from_pretrained(path, backend="pil")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: no readable image processor: {_first_line(error)}") from error


def _pixel_values(processor: Any, images: Sequence[Image.Image]) -> Tensor:
    pixel_values_BCHW: Tensor = processor(list(images), return_tensors="pt")["pixel_values"]
    if pixel_values_BCHW.ndim != 4:
        raise ValueError(f"{type(processor).__name__} cuts images into tiles: name the vision tower itself")
    return pixel_values_BCHW


@contextmanager
def _quiet() -> Iterator[None]:
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


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]
