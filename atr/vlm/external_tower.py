"""A frozen tower that the folder of a model names and leaves out: published, it is fetched where it lies.

The model's configuration names it as `mm_vision_tower`, as those of the original LLaVA do. Its vision_config
is cut off after the layer that is read, and its image size is the one that the model is given.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import Dinov2Config, LlavaForConditionalGeneration, PretrainedConfig

from atr.features.encoder import Encoder

PREFIX = "model.vision_tower."
"""Of its weights among those of the model."""
POSITIONS = "embeddings.position_embeddings"


def tower_of(config: PretrainedConfig) -> str | None:
    """Hub id of the tower that the model's folder leaves out, None where it holds its own."""
    name: str | None = getattr(config, "mm_vision_tower", None)
    return name


def cut_off(encoder: Encoder, image_size: int) -> Dinov2Config:
    """Configuration of an encoder's tower, of the layers that are run, for square images of that size."""
    # A name of its last layer does not outlive that layer, nor a path the machine.
    own = encoder.tower.config.to_dict()
    kept = {key: value for key, value in own.items() if key in Dinov2Config().to_dict()}
    for name in ("_name_or_path", "architectures", "dtype", "out_features", "out_indices", "stage_names"):
        kept.pop(name, None)
    return Dinov2Config.from_dict(kept | {"image_size": image_size, "use_mask_token": False})


def put_tower(model: LlavaForConditionalGeneration, path: str) -> None:
    """Load the tower that lies at `path`, folder or hub id, into a model that was made without its weights.

    Its positions are resampled once to the model's image size, as the tower itself does at every image of
    another size than its own. Raises ValueError naming `path` where it is not to be read or of another shape.
    """
    vision = model.config.vision_config
    if vision.model_type != "dinov2":
        raise ValueError(f"{path}: a tower of type {vision.model_type} cannot be left out, allowed: dinov2")
    encoder = Encoder.load(path, vision.num_hidden_layers, size=vision.image_size)
    weights = encoder.tower.state_dict()
    patches = weights[POSITIONS].new_empty(1, 1 + encoder.grid[0] * encoder.grid[1], encoder.width)
    weights[POSITIONS] = encoder.tower.embeddings.interpolate_pos_encoding(
        patches, vision.image_size, vision.image_size
    )
    try:
        # Not strict: the mask token of the hub's weights serves DINOv2's own training alone.
        missing, _ = model.model.vision_tower.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise ValueError(f"{path}: not the tower of this model: {' '.join(str(error).split())}") from error
    if missing:
        raise ValueError(f"{path}: not the tower of this model: it lacks {missing[0]}")


def fetch_tower(
    model: LlavaForConditionalGeneration, folder: str, resolve_weights: Callable[[str], str]
) -> None:
    """As `put_tower`, of the tower that the model of `folder` names; `resolve_weights` as in `load_vlm`."""
    name = tower_of(model.config)
    assert name is not None
    try:
        put_tower(model, resolve_weights(name))
    except ValueError as error:
        raise ValueError(f"{folder}: its tower {name} cannot be had: {error}") from error


def save_without_tower(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """Save all of the model but the tower that its configuration names."""
    assert tower_of(model.config), "nothing would be loaded in its place"
    weights: Mapping[str, Tensor] = model.state_dict()
    kept: dict[str, Any] = {name: value for name, value in weights.items() if not name.startswith(PREFIX)}
    model.save_pretrained(folder, state_dict=kept)
