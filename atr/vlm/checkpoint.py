"""Load a vision-language model and its processor from a folder or the hub, whole or not at all."""

import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaOnevisionProcessor,
    ProcessorMixin,
)

from atr.core import hub
from atr.core.fingerprint import fingerprint, is_same_tower
from atr.core.finite import check_finite_weights
from atr.core.hub import checkpoint_digest, pretrained_arguments
from atr.features.encoder import first_line, quiet, warn_of_substitute
from atr.features.preprocess import describe_preprocessing, explain_difference
from atr.reduction import FeatureSelector
from atr.vlm.external_tower import PREFIX, fetch_tower, tower_of
from atr.vlm.families import FAMILIES, family_of

_SAMPLE = Image.new("RGB", (97, 61))
_WEIGHTS = {"bf16": torch.bfloat16, "16": torch.float16, "32": torch.float32, "64": torch.float64}


class OnevisionImageProcessor(LlavaOnevisionProcessor):  # type: ignore[misc]  # untyped there
    """LLaVA-OneVision's processor of texts and images alone: its part for videos needs torchvision."""

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        num_image_tokens: int | None = None,
        vision_feature_select_strategy: str | None = None,
        chat_template: str | None = None,
        image_token: str = "<image>",
        video_token: str = "<video>",
        vision_aspect_ratio: str = "anyres_max_9",
    ) -> None:
        self.num_image_tokens = num_image_tokens
        self.vision_feature_select_strategy = vision_feature_select_strategy
        self.image_token, self.video_token = image_token, video_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)
        self.video_token_id = tokenizer.convert_tokens_to_ids(video_token)
        self.vision_aspect_ratio = vision_aspect_ratio
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


PROCESSORS = {"llava_onevision": OnevisionImageProcessor}
"""Of the families whose own processor asks for more than texts and images."""


def weight_dtype(precision: int | str) -> torch.dtype:
    """The type of a frozen model's weights under a precision of Lightning's.

    A mixed precision keeps float32 weights for the optimiser; without one, the weights take the lower
    precision themselves, which spares a cast at every layer of every decoding step.
    """
    return _WEIGHTS[str(precision).split("-")[0]]


def load_vlm(
    path: str, dtype: torch.dtype, attention: str = "sdpa", resolve_weights: Callable[[str], str] = str
) -> tuple[Any, Any]:
    """The frozen model, in eval mode and with weights of `dtype`, and its processor.

    A tower that the folder names and leaves out comes from where `resolve_weights` says its hub id lies.
    Raises ValueError naming `path` for what is no checkpoint, a family without host, a processor that is not
    there, counts visual tokens otherwise than the model or has no chat template, tokens of a tower that are no
    patches, weights that are broken, of another shape, not finite, or do not cover the model, and a tower
    that cannot be had.
    """
    try:
        config = AutoConfig.from_pretrained(**pretrained_arguments(path))
        family, is_fetched = config.model_type, tower_of(config) is not None
        if family not in FAMILIES:
            raise ValueError(
                f"{path}: model type {family!r} is not supported, allowed: {', '.join(FAMILIES)}"
            )
        processor = _load_processor(path, family)
        _check_counted(path, config, processor)
        with quiet() if is_fetched else nullcontext():  # its report of a missing tower
            loaded: Any = AutoModelForImageTextToText.from_pretrained(
                **pretrained_arguments(path),
                dtype=dtype,
                attn_implementation=attention,
                output_loading_info=True,
            )
    # transformers has an exception of its own for every file that is missing, cut off or of another shape.
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ValueError(f"{path}: no model could be loaded from it: {error}") from error
    model, loading = loaded
    # transformers would fill the gap with random numbers and a warning.
    absent = {key for key in loading["missing_keys"] if not (is_fetched and key.startswith(PREFIX))}
    if missing := sorted(absent):
        raise ValueError(f"{path}: the weights lack {missing[0]} and {len(missing) - 1} more")
    if is_fetched:
        fetch_tower(model, path, resolve_weights)
    check_finite_weights(model.state_dict(), path)
    return model.eval().requires_grad_(False), processor


def version_of(path: str, model: Any, resolve_weights: Callable[[str], str] = str) -> dict[str, str | None]:
    """Commit and digest of what `load_vlm` loaded; with the digest of a tower that the folder leaves out."""
    tower = tower_of(model.config)
    return hub.checkpoint_version(path) | (
        {"tower": checkpoint_digest(resolve_weights(tower))} if tower else {}
    )


def _load_processor(path: str, family: str) -> Any:
    """The processor of texts and images in a folder or of a hub id; errors as in `load_vlm`."""
    try:
        processor: Any = PROCESSORS.get(family, AutoProcessor).from_pretrained(**pretrained_arguments(path))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: no readable processor: {first_line(error)}") from error
    # Without processor_config.json transformers takes a processor that fails at the first image.
    counted = "num_image_tokens" if family in PROCESSORS else "patch_size"
    if not getattr(processor, counted, None):
        raise ValueError(f"{path}: no readable processor: its processor_config.json gives no {counted}")
    if not processor.chat_template:
        raise ValueError(f"{path}: the processor has no chat template to put a question in")
    warn_of_substitute(path, processor.image_processor)
    return processor


@torch.no_grad()
def _check_counted(path: str, config: Any, processor: Any) -> None:
    """Refuse a model that is fed more or less than the patches, and a processor that counts its tokens wrong.

    One image shows it: on torch's meta device the model makes as many tokens of it as ever, without weights.
    """
    with torch.device("meta"):
        skeleton = AutoModelForImageTextToText.from_config(config)
    inputs = processor(images=[[_SAMPLE]], text=[processor.image_token], return_tensors="pt")
    images = {key: inputs[key] for key in family_of(skeleton).image_keys if key in inputs}
    images["pixel_values"] = images["pixel_values"].to("meta")
    tile_1CHW = images["pixel_values"].flatten(0, -4)[:1]
    rows, columns = (side // config.vision_config.patch_size for side in tile_1CHW.shape[-2:])
    tokens = _made(path, skeleton.model.vision_tower, tile_1CHW).last_hidden_state.shape[1]
    strategy, leading = config.vision_feature_select_strategy, tokens - rows * columns
    if leading != (strategy == "default"):
        raise ValueError(
            f"{path}: vision_feature_select_strategy: {strategy!r} cannot serve a tower with {leading} "
            "tokens before its patches, allowed: default for 1, full for 0"
        )
    (read_PD,) = _made(path, skeleton.get_image_features, **images).pooler_output
    placeholders = int((inputs["input_ids"] == config.image_token_id).sum())
    if placeholders != len(read_PD):
        raise ValueError(
            f"{path}: the processor makes {placeholders} placeholders of an image of which the model reads "
            f"{len(read_PD)} tokens: {_miscounted(config, processor, rows * columns, leading)}"
        )


def _made(path: str, encode: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What a model makes of its processor's images; raises ValueError naming `path` where it cannot."""
    try:
        return encode(*args, **kwargs)
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"{path}: the model cannot read the images that its processor makes: {first_line(error)}"
        ) from error


def _miscounted(config: Any, processor: Any, patches: int, leading: int) -> str:
    """The fields by which a processor counts that do not fit its model, with what they should be."""
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


def cuts_images(model: Any) -> bool:
    """Whether the model's family cuts images into tiles, as many as their sizes ask for."""
    return "image_sizes" in family_of(model).image_keys


def check_features(model: Any, manifest: Mapping[str, Any]) -> None:
    """Raise ValueError unless a store's features are those the model's own tower gives its projector.

    Stored features are of whole images: a family that cuts images into tiles needs the images themselves.
    """
    if cuts_images(model):
        family = model.config.model_type
        raise ValueError(f"{family} cuts images into tiles, the stored features are of whole images")
    stored, (layer, depth) = manifest["layer"], _layer(model)
    if not isinstance(layer, int) or stored % depth != layer % depth:
        raise ValueError(f"the stored features are of layer {stored}, the model reads layer {layer}")
    found, wanted = [*manifest["grid"], manifest["width"]], _shape(model)
    if found != wanted:
        raise ValueError(f"the stored features are {found} (rows, columns, width), the model reads {wanted}")
    if not _has_tower(model, manifest.get("fingerprint")):
        raise ValueError(
            f"the stored features are of encoder {manifest['encoder']}, whose weights are not those of the "
            f"vision tower that {_name(model)} has"
        )


def other_images(processor: Any, manifest: Mapping[str, Any]) -> str:
    """How a store's images differ from those that the model's own processor makes; empty if they do not.

    The same tower makes other features of other pixels.
    """
    made = manifest["preprocess"]
    if made is None:
        return "nothing says how their images were preprocessed"
    differing = explain_difference(made, describe_preprocessing(processor.image_processor))
    return differing and f"their images and the model's differ in {differing}"


def check_selector(model: Any, selector: FeatureSelector) -> None:
    """Raise ValueError naming both unless a selector was trained on features such as the model reads.

    Layer, grid and width are compared, and the weights of the towers where both are known. A tower that was
    tuned with its language model, as LLaVA-NeXT's, passes for the one it was.
    """
    layer, depth = _layer(model)
    found, wanted = [*selector.grid, selector.trunk.width], _shape(model)
    same_layer = isinstance(layer, int) and (selector.layer or 0) % depth == layer % depth
    if found != wanted or not (selector.layer is None or same_layer):
        raise ValueError(
            f"the selector was trained on layer {selector.layer} of encoder {selector.encoder}, {found} "
            f"(rows, columns, width); {_name(model)} reads layer {layer}, {wanted}"
        )
    if not _has_tower(model, selector.record.get("fingerprint")):
        raise ValueError(
            f"the selector was trained on encoder {selector.encoder}, whose weights are not those of the "
            f"vision tower that {_name(model)} has, though of the same shape"
        )


def warn_of_positions(selector: FeatureSelector, positions: str) -> None:
    """Warn, once a process, of positions other than those that the selector's record names, if any."""
    known = selector.record.get("positions")
    if known not in (None, positions):
        warnings.warn(
            f"the selector of encoder {selector.encoder} was taught and evaluated with positions={known!r}, "
            f"it is used with positions={positions!r}: answers can be much worse",
            stacklevel=1,  # this line, so that Python shows it once, wherever the calls come from
        )


def _has_tower(model: Any, known: str | None) -> bool:
    """Whether the model's tower may be that of a fingerprint; a model not loaded yet has none to compare."""
    own = fingerprint(model.model.vision_tower) if known and hasattr(model, "model") else None
    return known is None or own is None or is_same_tower(known, own)


def _name(model: Any) -> str:
    return str(model.name_or_path or model.config.model_type)


def _layer(model: Any) -> tuple[int | list[int], int]:
    """The layer (or layers) the model reads, and by how many its negative and positive numbers differ.

    Of a tower that was cut off, an encoder of the whole one counts other negative numbers: none fits.
    """
    depth = model.config.vision_config.num_hidden_layers + 1
    return model.config.vision_feature_layer, sys.maxsize if tower_of(model.config) else depth


def _shape(model: Any) -> list[int]:
    """Rows, columns and width of the features of a tile that the model's projector reads."""
    vision, (layer, _) = model.config.vision_config, _layer(model)
    side = vision.image_size // vision.patch_size
    return [side, side, vision.hidden_size * (1 if isinstance(layer, int) else len(layer))]
