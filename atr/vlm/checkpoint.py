"""Loads a vision-language model and its processor from a folder or the hub, and checks that they fit."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForImageTextToText

from atr.core import hub
from atr.core.finite import check_finite_weights
from atr.core.hub import checkpoint_digest, pretrained_arguments
from atr.features.encoder import first_line, quiet, warn_of_substitute
from atr.vlm.compatibility import external_tower_name
from atr.vlm.external_tower import PREFIX, fetch_tower
from atr.vlm.families import Family, family_named, family_of
from atr.vlm.families.rule import Rule
from atr.vlm.inputs import Prompts
from atr.vlm.processors import load_processor, read_images

_SAMPLE = Image.new("RGB", (97, 61))
_WEIGHTS = {"bf16": torch.bfloat16, "16": torch.float16, "32": torch.float32, "64": torch.float64}


def weight_dtype(precision: int | str) -> torch.dtype:
    """The dtype of a frozen model's weights for a precision of Lightning.

    A mixed precision keeps float32 weights, as an optimiser needs them; otherwise the weights have the lower
    precision, which saves a cast in every layer of every decoding step.
    """
    return _WEIGHTS[str(precision).split("-")[0]]


def load_vlm(
    path: str, dtype: torch.dtype, attention: str = "sdpa", resolve_weights: Callable[[str], str] = str
) -> tuple[Any, Any]:
    """The frozen model, in eval mode with weights of `dtype`, and its processor.

    A vision tower that the folder names but does not contain is loaded from `resolve_weights(hub id)`.
    Raises a one-line ValueError naming `path` for a folder that is no checkpoint; an unsupported model
    family; a processor that is missing, counts visual tokens differently from the model or has no chat
    template; a tower whose tokens are not patches; weights that are corrupt, of another shape, not finite or
    incomplete; and a tower that is not available.
    """
    try:
        config = AutoConfig.from_pretrained(**pretrained_arguments(path))
        processor = _load_processor(path, _family(path, config.model_type))
        _check_token_count(path, config, processor)
        is_fetched = external_tower_name(config) is not None
        with quiet() if is_fetched else nullcontext():  # transformers would report the missing tower
            loaded: Any = AutoModelForImageTextToText.from_pretrained(
                **pretrained_arguments(path),
                dtype=dtype,
                attn_implementation=attention,
                output_loading_info=True,
            )
    # transformers raises different exceptions for files that are missing, cut off or of another shape.
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ValueError(f"{path}: no model could be loaded from it: {error}") from error
    model, loading = loaded
    # transformers would fill missing weights with random numbers and only warn.
    absent = {key for key in loading["missing_keys"] if not (is_fetched and key.startswith(PREFIX))}
    if missing := sorted(absent):
        raise ValueError(f"{path}: the weights lack {missing[0]} and {len(missing) - 1} more")
    if is_fetched:
        fetch_tower(model, path, resolve_weights)
    check_finite_weights(model.state_dict(), path)
    return model.eval().requires_grad_(False), processor


def load_skeleton(path: str) -> Any:
    """The model of a folder or hub id without its weights, on the meta device.

    Raises a one-line ValueError naming `path` for a folder that is no checkpoint and for an unsupported model
    family.
    """
    try:
        config = AutoConfig.from_pretrained(**pretrained_arguments(path))
    except OSError as error:
        raise ValueError(f"{path}: no model could be loaded from it: {error}") from error
    _family(path, config.model_type)
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)


def version_of(path: str, model: Any, resolve_weights: Callable[[str], str] = str) -> dict[str, str | None]:
    """Commit and digest of the checkpoint that `load_vlm` loaded, and the digest of an external tower."""
    tower = external_tower_name(model.config)
    return hub.checkpoint_version(path) | (
        {"tower": checkpoint_digest(resolve_weights(tower))} if tower else {}
    )


def _family(path: str, model_type: str) -> Family:
    try:
        return family_named(model_type)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _load_processor(path: str, family: Family) -> Any:
    """The processor of texts and images of a folder or hub id; errors as in `load_vlm`."""
    processor = load_processor(path, getattr(family, "processor", None))
    if not isinstance(family, Rule):
        # Without processor_config.json transformers returns a processor that fails at the first image.
        field = "num_image_tokens" if hasattr(processor, "num_image_tokens") else "patch_size"
        if not getattr(processor, field, None):
            raise ValueError(f"{path}: no readable processor: its processor_config.json gives no {field}")
    if not getattr(processor, "chat_template", None):
        raise ValueError(f"{path}: the processor has no chat template for questions")
    warn_of_substitute(path, processor.image_processor)
    return processor


def _check_token_count(path: str, config: Any, processor: Any) -> None:
    """Refuse a processor with another token count than the model, before the model's weights are read."""
    with torch.device("meta"):
        skeleton = AutoModelForImageTextToText.from_config(config)
    if isinstance(family_of(skeleton), Rule):
        _check_grids(path, skeleton, processor)
    else:
        _check_tower(path, skeleton, processor)


def _check_grids(path: str, skeleton: Any, processor: Any) -> None:
    """Compare the placeholders of one image with the grids that the model makes of it."""
    text = Prompts(processor).text("", 1)
    inputs, _ = read_images(processor, [[_SAMPLE]], [text], return_tensors="pt")
    try:
        family_of(skeleton).tiling(skeleton, inputs)
    except ValueError as error:
        found = first_line(error).partition(";")[0]
        raise ValueError(
            f"{path}: the model cannot read the images that its processor makes: {found}: patch size, merge "
            "size or tokens per tile are not the model's"
        ) from error


@torch.no_grad()
def _check_tower(path: str, skeleton: Any, processor: Any) -> None:
    """Refuse a model whose visual tokens are not the patches, and a processor with another token count.

    One image is processed and encoded on torch's meta device, where the model gives the same number of tokens
    without weights.
    """
    config = skeleton.config
    inputs = processor(images=[[_SAMPLE]], text=[processor.image_token], return_tensors="pt")
    images = {key: inputs[key] for key in family_of(skeleton).image_keys(skeleton) if key in inputs}
    images["pixel_values"] = images["pixel_values"].to("meta")
    tile_1CHW = images["pixel_values"].flatten(0, -4)[:1]
    rows, columns = (side // config.vision_config.patch_size for side in tile_1CHW.shape[-2:])
    tokens = _run(path, skeleton.model.vision_tower, tile_1CHW).last_hidden_state.shape[1]
    strategy, leading = config.vision_feature_select_strategy, tokens - rows * columns
    if leading != (strategy == "default"):
        raise ValueError(
            f"{path}: vision_feature_select_strategy: {strategy!r} cannot serve a tower with {leading} "
            "tokens before its patches, allowed: default for 1, full for 0"
        )
    (features_PD,) = _run(path, skeleton.get_image_features, **images).pooler_output
    placeholders = int((inputs["input_ids"] == config.image_token_id).sum())
    if placeholders != len(features_PD):
        raise ValueError(
            f"{path}: the processor makes {placeholders} placeholders of an image of which the model reads "
            f"{len(features_PD)} tokens: {_wrong_fields(config, processor, rows * columns, leading)}"
        )


def _run(path: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a model on its processor's images; raises ValueError naming `path` if they do not fit."""
    try:
        return function(*args, **kwargs)
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"{path}: the model cannot read the images that its processor makes: {first_line(error)}"
        ) from error


def _wrong_fields(config: Any, processor: Any, patches: int, leading: int) -> str:
    """The processor's fields that give the token count and do not fit the model, with the values needed."""
    needed = {
        "patch_size": config.vision_config.patch_size,
        "num_additional_image_tokens": leading,
        "num_image_tokens": patches,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        "vision_aspect_ratio": getattr(config, "vision_aspect_ratio", None),
    }
    wrong = [
        f"{field} is {getattr(processor, field)!r}, needed: {value!r}"
        for field, value in needed.items()
        if hasattr(processor, field) and getattr(processor, field) != value
    ]
    return "; ".join(wrong) or "size or image_grid_pinpoints of its image processor are not the model's"
