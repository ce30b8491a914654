"""A frozen, published vision tower that a model's folder names but does not contain; it comes from the hub.

The model's configuration names it as `mm_vision_tower`, as the original LLaVA's does. The `vision_config` has
the layers up to the one that the model reads, and the image size of the model's images.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import Dinov2Config, LlavaForConditionalGeneration

from atr.features.encoder import Encoder
from atr.vlm.compatibility import external_tower_name

PREFIX = "model.vision_tower."
"""Prefix of the tower's weights in the model's state dict."""
_POSITIONS = "embeddings.position_embeddings"


def cut_off(encoder: Encoder, image_size: int) -> Dinov2Config:
    """The configuration of an encoder's tower, cut off after the last layer that runs, for square images.

    `image_size` is their side in pixels.
    """
    # Names of layers that are cut off, and paths of this machine, are left out.
    own = encoder.tower.config.to_dict()
    kept = {key: value for key, value in own.items() if key in Dinov2Config().to_dict()}
    for name in ("_name_or_path", "architectures", "dtype", "out_features", "out_indices", "stage_names"):
        kept.pop(name, None)
    return Dinov2Config.from_dict(kept | {"image_size": image_size, "use_mask_token": False})


def put_tower(model: LlavaForConditionalGeneration, path: str) -> None:
    """Load the tower at `path`, a folder or hub id, into a model that was built without its weights.

    The position embeddings are interpolated once to the model's image size, as the tower itself does for each
    image of another size than its own. Raises ValueError naming `path` for a tower that cannot be read or has
    another shape.
    """
    vision = model.config.vision_config
    if vision.model_type != "dinov2":
        raise ValueError(f"{path}: a tower of type {vision.model_type} cannot be left out, allowed: dinov2")
    encoder = Encoder.load(path, vision.num_hidden_layers, size=vision.image_size)
    weights = encoder.tower.state_dict()
    patches = weights[_POSITIONS].new_empty(1, 1 + encoder.grid[0] * encoder.grid[1], encoder.width)
    weights[_POSITIONS] = encoder.tower.embeddings.interpolate_pos_encoding(
        patches, vision.image_size, vision.image_size
    )
    try:
        # Not strict: the mask token in the hub's weights is used only in DINOv2's training.
        missing, _ = model.model.vision_tower.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise ValueError(f"{path}: not the tower of this model: {' '.join(str(error).split())}") from error
    if missing:
        raise ValueError(f"{path}: not the tower of this model: it lacks {missing[0]}")


def fetch_tower(
    model: LlavaForConditionalGeneration, folder: str, resolve_weights: Callable[[str], str]
) -> None:
    """As `put_tower`, for the tower that the model of `folder` names.

    `resolve_weights` maps a hub id to the folder of its weights.
    """
    name = external_tower_name(model.config)
    assert name is not None
    try:
        put_tower(model, resolve_weights(name))
    except ValueError as error:
        raise ValueError(f"{folder}: its tower {name} is not available: {error}") from error


def save_without_tower(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """Save the model without the tower that its configuration names."""
    assert external_tower_name(model.config), "the tower could not be loaded again"
    weights: Mapping[str, Tensor] = model.state_dict()
    kept: dict[str, Any] = {name: value for name, value in weights.items() if not name.startswith(PREFIX)}
    model.save_pretrained(folder, state_dict=kept)
