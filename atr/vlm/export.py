"""Exports tower, selector, top K and projector of a LLaVA as one graph, which other engines run.

Shapes: see `atr.core.tokens`. The graph takes the processor's pixel values (B, C, H, W) of any number of
images and gives the kept tokens as the language model reads them, (B, K, D), and their indices, (B, K). The
language model is no part of it.
"""

import logging
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from atr.core import tokens
from atr.core.files import whole_folder, write_json
from atr.core.tokens import gather
from atr.reduction import FeatureSelector
from atr.reduction.checked import select
from atr.reduction.distilled import COVERED
from atr.reduction.greedy import min_max_BN
from atr.reduction.similarity import exact_cosines_BNN
from atr.vlm.checkpoint import load_skeleton, load_vlm
from atr.vlm.compatibility import check_keep, check_selector
from atr.vlm.families import Tiling
from atr.vlm.families.tower import encode_tiles, project, token_grid
from atr.vlm.policy import Policy
from atr.vlm.selection import as_reducer

FILES = {
    "torch": "vision.pt2",
    "onnx": "vision.onnx",
    "openvino": "openvino_vision_embeddings_model.xml",
}
"""File of each format; OpenVINO GenAI looks for its vision encoder under this name."""
EXPORT_SETTINGS = "export.json"
"""File beside the graph: what was exported, and how many tokens it keeps."""
OPSET = 20
"""Version of the operator set ai.onnx."""
OUTPUTS = ("image_features", "kept_indices")
_PACKAGES = {
    "torch": (),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("onnx", "onnxscript", "openvino"),
}

RunVision = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From pixels_BCHW to the kept tokens (B, K, D) and their indices keep_BK."""


class VisionGraph(nn.Module):
    """Tower, selector, choice of K tokens, and projector of a LLaVA, for export.

    The choice is that of `SelectorReducer`, or of `DistilledReducer` for a distilled selector, written in
    operators that every exporter knows and whose result does not depend on how an engine breaks ties. Scores
    are not checked: pixels that are not finite give meaningless tokens.
    """

    def __init__(self, model: Any, selector: FeatureSelector, kept: int) -> None:
        super().__init__()
        self.tower, self.projector = model.model.vision_tower, model.model.multi_modal_projector
        self.selector, self.kept = selector, kept
        self.config, self.dtype = model.config, model.dtype

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """The kept tokens as the language model reads them (B, K, D), and their indices (B, K)."""
        # The two parts alone, so that an exporter finds no weights of the language model.
        parts = SimpleNamespace(vision_tower=self.tower, multi_modal_projector=self.projector)
        model = SimpleNamespace(model=parts, config=self.config, dtype=self.dtype)
        encoded = encode_tiles(model, {"pixel_values": pixel_values}, _one_tile(model, pixel_values))
        scores_BN = self.selector(encoded.features_BND)
        if self.selector.is_taught:
            covered = min(self.kept, tokens.budget(COVERED, encoded.tokens))
            first_BN = _cover_BN(encoded.require("projected_BND"), scores_BN, covered)
            scores_BN = scores_BN.masked_fill(first_BN, torch.inf)
        keep_BK = _best_BK(scores_BN, self.kept)
        return project(model, _take(encoded.features_BND, keep_BK)), keep_BK


def _best_BK(scores_BN: Tensor, k: int) -> Tensor:
    """As `top_k_BK`: by each token's rank, as exporters know no stable sort and engines break ties freely."""
    own_BN1, other_B1N = scores_BN.unsqueeze(2), scores_BN.unsqueeze(1)
    count = scores_BN.shape[1]
    is_earlier_NN = torch.ones(count, count, dtype=torch.bool, device=scores_BN.device).tril(-1)
    is_before_BNN = (other_B1N > own_BN1) | ((other_B1N == own_BN1) & is_earlier_NN)
    best_BK = is_before_BNN.sum(2).topk(k, dim=1, largest=False).indices
    return best_BK.topk(k, dim=1, largest=False).values  # distinct, as ranks and indices are


def _cover_BN(projected_BND: Tensor, scores_BN: Tensor, k: int) -> Tensor:
    """Mask of the k tokens that `Scope(..., on="projected")` takes first, in a loop that is unrolled."""
    saliency_BN, cosines_BNN = min_max_BN(scores_BN), exact_cosines_BNN(projected_BND)
    covered_BN = torch.zeros_like(saliency_BN)
    taken_BN = torch.zeros_like(saliency_BN, dtype=torch.bool)
    for _ in range(k):
        reached_BN = torch.maximum(cosines_BNN, covered_BN.unsqueeze(1)).sum(2)
        gain_BN = saliency_BN * (reached_BN - covered_BN.sum(1, keepdim=True))
        best_B1 = gain_BN.float().masked_fill(taken_BN, -torch.inf).argmax(1, keepdim=True)
        taken_BN = taken_BN.scatter(1, best_B1, True)
        covered_BN = torch.maximum(covered_BN, _take(cosines_BNN, best_B1).squeeze(1))
    return taken_BN


def _take(values_BND: Tensor, index_BK: Tensor) -> Tensor:
    """As `gather`, whose `take_along_dim` fixes the number of images in an exported graph."""
    return values_BND.gather(1, index_BK.unsqueeze(-1).expand(-1, -1, values_BND.shape[-1]))


def _one_tile(model: Any, pixels_BCHW: Tensor) -> Tiling:
    return Tiling.of_one_grid((1,), token_grid(model, pixels_BCHW))


@dataclass(frozen=True)
class Exported:
    """An exported folder, with the processor and the model that it was made of."""

    folder: Path
    format: str
    kept: int
    of: int
    model: Any
    processor: Any
    selector: FeatureSelector

    @property
    def bytes(self) -> int:
        """Size of the graph with its weights."""
        return sum(path.stat().st_size for path in self.folder.iterdir() if path.name != EXPORT_SETTINGS)

    def pixels(self, image: Image.Image) -> Tensor:
        """The processor's pixel values of one image, (1, C, H, W)."""
        pixels_1CHW: Tensor = self.processor.image_processor(images=[image], return_tensors="pt").pixel_values
        return pixels_1CHW

    @torch.no_grad()
    def run_eagerly(self, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """The kept tokens and indices as `reduce` computes them, by the model's own modules."""
        tiling = _one_tile(self.model, pixels_BCHW)
        encoded = encode_tiles(self.model, {"pixel_values": pixels_BCHW}, tiling)
        keep_BK = select(as_reducer(self.selector), encoded, self.kept)
        return gather(encoded.require("projected_BND"), keep_BK), keep_BK


def export_vision(vlm: str, selector: str, keep: float | str, to: str, folder: Path) -> Exported:
    """Write the graph of a LLaVA-1.5 and a selector in float32 to a new folder, whole or not at all.

    `keep` is a fraction or a count, fixed in the graph. Raises a one-line ValueError, before the weights of
    the language model are read, for another format, an adaptive or impossible `keep`, a folder that exists,
    packages that are missing, another family, and a selector of other features.
    """
    policy = _check_settings(keep, to, folder)
    skeleton = load_skeleton(vlm)
    _check_model(vlm, skeleton)
    loaded = FeatureSelector.from_pretrained(selector)
    check_selector(skeleton, loaded)
    of = loaded.grid[0] * loaded.grid[1]
    assert not isinstance(policy.keep, str)
    kept = tokens.budget(policy.keep, of)
    check_keep(as_reducer(loaded), policy.keep)
    model, processor = load_vlm(vlm, torch.float32)
    check_selector(model, loaded)
    exported = Exported(folder, to, kept, of, model, processor, loaded)
    sample_1CHW = exported.pixels(Image.new("RGB", (97, 61)))
    graph = VisionGraph(model, loaded, kept).eval()
    with whole_folder(folder) as unfinished:
        _write(_trace(graph, sample_1CHW), to, unfinished / FILES[to])
        write_json(unfinished / EXPORT_SETTINGS, _settings(vlm, selector, exported, sample_1CHW))
    return exported


def _check_settings(keep: float | str, to: str, folder: Path) -> Policy:
    if to not in FILES:
        raise ValueError(f"to: {to!r} is unknown, allowed: {', '.join(FILES)}")
    if isinstance(keep, str):
        raise ValueError(f"keep: {keep!r} is not allowed in a graph, allowed: a fraction or a count")
    policy = Policy(keep)
    if os.path.lexists(folder):
        raise ValueError(f"{folder} exists, allowed: a new folder")
    for package in _PACKAGES[to]:
        _import(package)
    return policy


def _import(package: str) -> Any:
    """An optional package; raises ValueError naming it and the extra that has it."""
    try:
        return import_module(package)
    except ImportError as error:
        raise ValueError(f"{package} cannot be imported ({error}): it is of the extra atr[export]") from error


def _check_model(vlm: str, skeleton: Any) -> None:
    if skeleton.config.model_type != "llava":
        raise ValueError(f"{vlm}: model type {skeleton.config.model_type!r} is not exported, allowed: llava")


def _settings(vlm: str, selector: str, exported: Exported, sample_1CHW: Tensor) -> dict[str, Any]:
    opset = {} if exported.format == "torch" else {"opset": OPSET}
    return opset | {
        "format": exported.format,
        "grid": list(exported.selector.grid),
        "kept": exported.kept,
        "of": exported.of,
        "outputs": list(OUTPUTS),
        "pixels": list(sample_1CHW.shape[1:]),
        "positions": exported.selector.record.get("positions"),
        "selector": selector,
        "vlm": vlm,
    }


@torch.no_grad()
def _trace(graph: VisionGraph, sample_1CHW: Tensor) -> Any:
    """The program of the graph, for one image and more."""
    batch = torch.export.Dim("batch", min=1)
    pixels_BCHW = sample_1CHW.repeat(2, 1, 1, 1)  # a batch of one would be a constant
    return torch.export.export(graph, (pixels_BCHW,), dynamic_shapes={"pixel_values": {0: batch}})


def _write(program: Any, to: str, path: Path) -> None:
    if to == "torch":
        torch.export.save(program, path)
    elif to == "onnx":
        _write_onnx(program, path)
    else:
        openvino, onnx = _import("openvino"), path.with_suffix(".onnx")
        _write_onnx(program, onnx)
        # The default would round the weights to float16.
        openvino.save_model(openvino.convert_model(onnx), path, compress_to_fp16=False)
        for file in path.parent.glob(f"{onnx.name}*"):  # with weights above 2 GB beside it
            file.unlink()


def _write_onnx(program: Any, path: Path) -> None:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns that there is no torchvision
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch's own code
        converted = torch.onnx.export(
            program, opset_version=OPSET, output_names=OUTPUTS, dynamo=True, verbose=False
        )
    assert converted is not None
    converted.save(path)


def load_exported(folder: Path, format: str) -> RunVision:
    """The function of an exported folder, by torch, ONNX Runtime or OpenVINO, on as many threads as torch."""
    path, threads = folder / FILES[format], torch.get_num_threads()
    if format == "torch":
        run: RunVision = torch.export.load(path).module()
        return torch.no_grad()(run)
    if format == "onnx":
        return _load_onnx(path, threads)
    return _load_openvino(path, threads)


def _load_onnx(path: Path, threads: int) -> RunVision:
    runtime = _import("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        features, kept = session.run(list(OUTPUTS), {"pixel_values": pixels_BCHW.numpy()})
        return torch.from_numpy(features), torch.from_numpy(kept)

    return run


def _load_openvino(path: Path, threads: int) -> RunVision:
    # Without the hint a CPU with bfloat16 units computes in bfloat16, and keeps other tokens at the border.
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    compiled = _import("openvino").Core().compile_model(path, "CPU", options)

    def run(pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        results = compiled([pixels_BCHW.numpy()])
        features, kept = (torch.from_numpy(results[name].copy()) for name in OUTPUTS)
        return features, kept

    return run
