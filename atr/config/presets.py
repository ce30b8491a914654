"""Encoders and vision-language models by name: one YAML file each in atr/config/presets."""

import json
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import yaml
from pydantic.dataclasses import dataclass

from atr.config.errors import ConfigError, abridge, join
from atr.config.fields import STRICT, EncoderLayer, Pixels
from atr.config.loader import build

FOLDER = Path(__file__).with_suffix("")

# org/name, with an optional branch, tag or commit.
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w-][\w./-]*)?")


@dataclass(frozen=True, config=STRICT)
class EncoderPreset:
    """A frozen vision tower."""

    name: str
    path: str
    """Folder, or hub id (org/name, or org/name@revision), of the weights and of their image processor."""
    layer: EncoderLayer = -2
    """Index into `hidden_states`, as LLaVA's `vision_feature_layer`; -2 is what LLaVA itself reads. Or
    merged: the tokens that the language model is fed, each made of several patches."""
    size: int | None = None
    """Side in pixels of the square that the whole image is resized to; None: the image processor's own."""
    width: int | None = None
    """Channels of its features at `layer`; None if unknown before it is loaded."""
    patch_width: int | None = None
    """Channels of its patches' states, if `layer` is merged; None if unknown."""
    min_pixels: Pixels = None
    """Smallest area of an image, which smaller ones are enlarged to; None: the image processor's own."""
    max_pixels: Pixels = None
    """Largest area of an image, which larger ones are shrunk to; None: the image processor's own."""

    def width_at(self, layer: int | str | None) -> int | None:
        """Channels of its features at a layer, its own if None; None if unknown before it is loaded."""
        other_kind = layer is not None and (layer == "merged") != (self.layer == "merged")
        return self.patch_width if other_kind else self.width


@dataclass(frozen=True, config=STRICT)
class VlmPreset:
    """A frozen vision-language model."""

    name: str
    path: str
    """Folder, or hub id (org/name, or org/name@revision), of the weights and of their processor."""
    encoder: str | None
    """Name of the encoder whose features the model reads; None if only the model's files can tell."""
    stored: bool = True
    """Whether the model reads stored features. Otherwise it reads images, as does any model that cuts them
    into tiles or preprocesses them differently."""
    tiles: int = 1
    """Maximum number of tiles of an image, the base tile included; 1 if unknown."""
    auto: bool = False
    """Whether `vlm: auto` takes this model if several read the encoder."""
    min_pixels: Pixels = None
    """Smallest area of an image, as the encoder's; None: the image processor's own."""
    max_pixels: Pixels = None
    """Largest area of an image, as the encoder's; None: the image processor's own."""
    model_type: str | None = None
    """The type in transformers, which decides which reducers serve the model; None if only its files can
    tell."""


Preset = TypeVar("Preset", EncoderPreset, VlmPreset)


def read_presets(kind: type[Preset], folder: Path) -> dict[str, Preset]:
    """The presets of a folder by name; raises ConfigError for a file that is no preset."""
    presets = {path.stem: _read(kind, path) for path in sorted(folder.glob("*.yaml"))}
    return dict(sorted(presets.items(), key=lambda item: not getattr(item[1], "auto", False)))


def _read(kind: type[Preset], path: Path) -> Preset:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}, allowed: a preset in YAML") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: {abridge(values)} is not a mapping, allowed: a preset in YAML")
    return build(kind, f"{path}: ", {"name": path.stem, **values})


ENCODERS = read_presets(EncoderPreset, FOLDER / "encoders")
VLMS = read_presets(VlmPreset, FOLDER / "vlms")
"""Models that `auto` takes among several come first."""


def resolve_encoder(name: str) -> EncoderPreset:
    """The encoder of that name, folder or hub id; raises ConfigError if there is none."""
    if preset := find_preset(ENCODERS, name):
        return preset
    _check_location("encoder", name, ENCODERS)
    return EncoderPreset(name=name, path=name)


def is_known(encoder: EncoderPreset) -> bool:
    """Whether the encoder is a preset, at whatever revision, whose facts hold."""
    return _without_revision(encoder.name) in ENCODERS


def resolve_vlm(name: str, encoder: EncoderPreset) -> VlmPreset:
    """The model of that name, folder or hub id; raises ConfigError for a preset that reads another encoder.

    Whether a model reads an encoder of the user's own is only known when both are loaded.
    """
    encoder_base, base = _without_revision(encoder.name), _without_revision(name)
    readers = [preset for preset in VLMS.values() if preset.encoder == encoder_base]
    allowed = f"{join([preset.name for preset in readers]) or 'no preset'}, a folder, or a hub id org/name"
    if name == "auto":
        if len(readers) == 1 or (readers and readers[0].auto):
            return readers[0]
        found = f"{len(readers)} models that read" if readers else "no model that reads"
        raise ConfigError(f"vlm: 'auto' finds {found} encoder {encoder.name!r}, allowed: {allowed}")
    preset = find_preset(VLMS, name)
    if preset and preset.encoder == encoder_base:
        return preset
    if preset and (base in VLMS or encoder_base in ENCODERS):
        raise ConfigError(f"vlm: {name!r} does not read encoder {encoder.name!r}, allowed: {allowed}")
    _check_location("vlm", name, ("auto", *VLMS))
    return VlmPreset(name=name, path=name, encoder=None, model_type=_model_type(Path(name)))


def _model_type(folder: Path) -> str | None:
    """The model type that a folder's config.json names; None if it does not say, as for a hub id."""
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # a damaged file is named when the model is loaded
    return kind if isinstance(kind, str) else None


def find_preset(presets: Mapping[str, Preset], name: str) -> Preset | None:
    """The preset of that name, folder or hub id, at the revision given after an `@`; None if there is none.

    Without a revision the preset's own is used, so that later commits on the hub change no result.
    """
    base = _without_revision(name)
    preset = next(
        (preset for preset in presets.values() if base in (preset.name, _without_revision(preset.path))), None
    )
    if preset is None or name in (base, preset.path):
        return preset
    revision = name.removeprefix(base)
    path = _without_revision(preset.path) + revision
    return replace(preset, name=preset.name + revision, path=path) if _HUB_ID.fullmatch(path) else None


def _without_revision(name: str) -> str:
    return name.partition("@")[0]


def _check_location(key: str, name: str, presets: Collection[str]) -> None:
    """Refuse a name that is neither a folder nor a hub id; where `data` exists, `data/mirco` is no hub id."""
    is_hub_id = _HUB_ID.fullmatch(name) and not os.path.isdir(os.path.dirname(_without_revision(name)))
    if not (os.path.isdir(name) or is_hub_id):
        allowed = f"{join(presets)}, a folder that exists, or a hub id org/name or org/name@revision"
        raise ConfigError(f"{key}: {abridge(name)} is unknown, allowed: {allowed}")
