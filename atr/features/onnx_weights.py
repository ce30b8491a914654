"""Reads the weights of a DINOv2 from an ONNX file, under the names of DINOv2's published checkpoints.

torch's exporter keeps the names of most weights, but turns the matrices of linear layers (transposed) and the
two parts of the position embedding into unnamed constants. The nodes that use these constants identify them.
"""

import re

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

NamedWeights = dict[str, NDArray[np.float32]]

_POSITIONS = "embeddings.position_embeddings"
_ROOT = "backbone"  # name of the DINOv2 within the exported module
_LINEAR = re.compile(rf"/{_ROOT}/(.+)/MatMul")
# The class token's position is concatenated; those of the patches are reshaped before interpolation.
_POSITION_NODES = {"Concat": 0, "Reshape": 1}


def read_dinov2_weights(model: onnx.ModelProto) -> NamedWeights:
    """Weights of the backbone by their published names, without anything after the backbone.

    Raises ValueError if a part of the position embedding is not found.
    """
    constants = {constant.name: numpy_helper.to_array(constant) for constant in model.graph.initializer}
    named = {
        name.removeprefix(f"{_ROOT}."): value
        for name, value in constants.items()
        if name.startswith(f"{_ROOT}.")
    }
    positions: dict[int, NDArray[np.float32]] = {}
    for node in model.graph.node:
        for constant in (name for name in node.input if name in constants and not name.startswith(_ROOT)):
            if linear := _LINEAR.fullmatch(node.name):
                named[f"{linear[1].replace('/', '.')}.weight"] = constants[constant].T
            elif node.name.startswith(f"/{_ROOT}/embeddings/") and node.op_type in _POSITION_NODES:
                positions[_POSITION_NODES[node.op_type]] = constants[constant]
    if len(positions) != len(_POSITION_NODES):
        raise ValueError(f"the ONNX graph has {len(positions)} parts of {_POSITIONS}, needed: 2")
    named[_POSITIONS] = np.concatenate([positions[0], positions[1]], axis=1)
    return {name: np.ascontiguousarray(value, dtype=np.float32) for name, value in named.items()}
