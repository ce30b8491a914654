"""Checks that a selector, stored features and a layout fit a model, before anything is computed."""

import sys
import warnings
from collections.abc import Mapping
from inspect import signature
from typing import Any

from transformers import MODEL_MAPPING

from atr.core.fingerprint import fingerprint, is_same_tower
from atr.features.merged import vision_tower
from atr.features.preprocess import describe_preprocessing, explain_difference
from atr.reduction import FeatureSelector, Reducer, SelectorReducer
from atr.reduction.limits import NoImage
from atr.vlm.families import family_of
from atr.vlm.families.rule import Rule
from atr.vlm.policy import check_choice


def check_model(model: Any) -> None:
    """Raise ValueError for a model of no family, and for the part of one without a head to generate with."""
    if hasattr(model, "config"):
        family_of(model)
    if not hasattr(model, "generate"):
        raise ValueError(
            f"model: {type(model).__name__} does not generate, allowed: one of AutoModelForImageTextToText"
        )


def is_ruled(model: Any) -> bool:
    """Whether the model's family is the rule, whose images have grids of their own."""
    return isinstance(family_of(model), Rule)


def check_selector(model: Any, selector: FeatureSelector) -> None:
    """Raise ValueError naming both unless a selector was trained on the features that the model reads.

    Layer, grid and width are compared, and the weights of the towers if both are known; the grid not in a
    family whose images have grids of their own, the layer only as far as the tower has it. A tower that was
    fine-tuned with its language model, as in LLaVA-NeXT, counts as the original one.
    """
    if is_ruled(model):
        _check_width(model, selector)
    else:
        _check_shape(model, selector)
    if not _may_have_tower(model, selector.record.get("fingerprint")):
        raise ValueError(
            f"the selector was trained on encoder {selector.encoder}, whose weights are not those of the "
            f"vision tower that {_name(model)} has, though of the same shape"
        )


def _check_shape(model: Any, selector: FeatureSelector) -> None:
    """LLaVA's features: patches of one grid, at the layer that the projector reads."""
    layer, depth = _layer(model)
    trained, read = [*selector.grid, selector.trunk.width], _shape(model)
    given: Any = 0 if selector.layer is None else selector.layer
    same_layer = isinstance(layer, int) and isinstance(given, int) and given % depth == layer % depth
    if trained != read or not (selector.layer is None or same_layer):
        raise ValueError(
            f"the selector was trained on layer {selector.layer} of encoder {selector.encoder}, {trained} "
            f"(rows, columns, width); {_name(model)} reads layer {layer}, {read}"
        )


def _check_width(model: Any, selector: FeatureSelector) -> None:
    """The rule's features: merged tokens of the language model's width, or states of the tower's."""
    layer: Any = "merged" if selector.layer is None else selector.layer
    vision = model.config.vision_config
    trained = (
        f"the selector was trained on layer {layer} of encoder {selector.encoder}, features of width "
        f"{selector.trunk.width}"
    )
    if layer == "merged":
        read = model.config.get_text_config().hidden_size
    else:
        depth = vision.num_hidden_layers
        if layer == 0 or not -depth <= layer <= depth:
            raise ValueError(f"{trained}; the tower of {_name(model)} has layers 1 to {depth}")
        read = getattr(vision, "embed_dim", vision.hidden_size)
    if selector.trunk.width != read:
        raise ValueError(f"{trained}; {_name(model)} has width {read} there")


def selector_of(reducer: Any) -> FeatureSelector | None:
    """The trained selector of a reducer, or of the scores that it goes by; None if it has none."""
    parts = [reducer, *getattr(reducer, "__dict__", {}).values()]
    return next((part.selector for part in parts if isinstance(part, SelectorReducer)), None)


def check_reducer(model: Any, reducer: Any, positions: str) -> None:
    """As `check_selector` if the reducer has a selector, with the warning of `warn_of_positions`."""
    if (selector := selector_of(reducer)) is not None:
        check_selector(model, selector)
        warn_of_positions(selector, positions)


def check_keep(reducer: Reducer, keep: float | str) -> None:
    """Raise ValueError if no visual token would be left of any image, unless the reducer is made for that."""
    if keep == 0 and not isinstance(reducer, NoImage):
        raise ValueError(
            f"keep: {keep} leaves no visual token, allowed: more, or NoImage instead of "
            f"{type(reducer).__name__}"
        )


def warn_of_positions(selector: FeatureSelector, positions: str) -> None:
    """Warn, once per process, if the selector's record names other positions."""
    known = selector.record.get("positions")
    if known not in (None, positions):
        warnings.warn(
            f"the selector of encoder {selector.encoder} was trained and evaluated with positions={known!r}, "
            f"it is used with positions={positions!r}: answers can be much worse",
            stacklevel=1,  # this line, so that Python shows the warning once, whatever the caller
        )


def check_positions(model: Any, positions: str) -> None:
    """Raise ValueError for original positions if the model would misread them or takes no position ids."""
    check_choice("positions", positions)
    if positions != "original":
        return
    family, model_type = family_of(model), model.config.model_type
    if isinstance(family, Rule) and positions not in family.entry.positions:
        allowed = ", ".join(family.entry.positions)
        raise ValueError(
            f"positions: original is not supported by {model_type}, whose generate drops position ids, "
            f"allowed: {allowed}"
        )
    text = model.config.get_text_config()
    if "flash" in str(text._attn_implementation):
        raise ValueError(
            f"positions: original is not safe under {text._attn_implementation}, allowed: contiguous"
        )
    if not takes_positions(model):
        raise ValueError(f"positions: original is not supported by {text.model_type}, allowed: contiguous")


def takes_positions(model: Any) -> bool:
    """Whether the language model takes position ids."""
    text = model.config.get_text_config()
    # The class is looked up by its configuration, because the model's own method may be wrapped or compiled.
    # A few language models stand in no mapping.
    reader = MODEL_MAPPING[type(text)] if type(text) in MODEL_MAPPING else type(model.get_decoder())
    return "position_ids" in signature(reader.forward).parameters


def cuts_images(model: Any) -> bool:
    """Whether the model's family cuts images into tiles, depending on their sizes."""
    return "image_sizes" in family_of(model).image_keys(model)


def check_features(model: Any, manifest: Mapping[str, Any]) -> None:
    """Raise ValueError unless stored features are those that the model's tower gives its projector.

    `manifest` is the feature store's. Stored features are of whole images, so that a family that cuts images
    into tiles is refused.
    """
    family = model.config.model_type
    if is_ruled(model):
        raise ValueError(f"{family} encodes images itself, the stored features are of another encoder's grid")
    if cuts_images(model):
        raise ValueError(f"{family} cuts images into tiles, the stored features are of whole images")
    stored_layer, (layer, depth) = manifest["layer"], _layer(model)
    if not isinstance(layer, int) or stored_layer % depth != layer % depth:
        raise ValueError(f"the stored features are of layer {stored_layer}, the model reads layer {layer}")
    stored, read = [*manifest["grid"], manifest["width"]], _shape(model)
    if stored != read:
        raise ValueError(f"the stored features are {stored} (rows, columns, width), the model reads {read}")
    if not _may_have_tower(model, manifest.get("fingerprint")):
        raise ValueError(
            f"the stored features are of encoder {manifest['encoder']}, whose weights are not those of the "
            f"vision tower that {_name(model)} has"
        )


def other_images(processor: Any, manifest: Mapping[str, Any]) -> str:
    """How a store's images differ from those that the model's processor makes; empty if they are the same.

    The same tower gives other features for other pixels.
    """
    preprocess = manifest["preprocess"]
    if preprocess is None:
        return "their manifest does not say how images were preprocessed"
    differing = explain_difference(preprocess, describe_preprocessing(processor.image_processor))
    return differing and f"their images and the model's differ in {differing}"


def external_tower_name(config: Any) -> str | None:
    """Hub id of the tower that the model's folder leaves out; None if the folder holds the tower."""
    name: str | None = getattr(config, "mm_vision_tower", None)
    return name


def _may_have_tower(model: Any, known: str | None) -> bool:
    """Whether the model's tower may have this fingerprint; unknown if it is not loaded yet, or has none."""
    tower = vision_tower(model) if known and hasattr(model, "model") else None
    own = None if tower is None else fingerprint(tower)
    return known is None or own is None or is_same_tower(known, own)


def _name(model: Any) -> str:
    return str(model.name_or_path or model.config.model_type)


def _layer(model: Any) -> tuple[int | list[int], int]:
    """The layer (or layers) that the model reads, and the offset between negative and positive numbers.

    An external tower is cut off after that layer. Negative numbers count from the last layer, which is not
    that of the whole encoder, so the offset makes them match none of its layers.
    """
    depth = model.config.vision_config.num_hidden_layers + 1
    return model.config.vision_feature_layer, sys.maxsize if external_tower_name(model.config) else depth


def _shape(model: Any) -> list[int]:
    """Rows, columns and width of the features of a tile that the model's projector reads."""
    vision, layer = model.config.vision_config, model.config.vision_feature_layer
    side = vision.image_size // vision.patch_size
    return [side, side, vision.hidden_size * (1 if isinstance(layer, int) else len(layer))]
