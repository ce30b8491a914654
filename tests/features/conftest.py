"""A tiny DINOv2, an ONNX graph of it like those of torch's exporter, and tiny vision-language models."""

import runpy
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import helper, numpy_helper
from transformers import Dinov2Config, Dinov2Model

TINY = {
    "model_type": "dinov2",
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "patch_size": 14,
    "image_size": 56,
    "mlp_ratio": 2,
    "use_mask_token": False,
}
# Names in transformers, and in the checkpoints on the hub and older exports.
RENAMED = {
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
}


@pytest.fixture(scope="session")
def dinov2():
    """A random DINOv2 in which all weights differ."""
    torch.manual_seed(0)
    model = Dinov2Model(Dinov2Config(**TINY)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


@pytest.fixture(scope="session")
def dinov2_weights(dinov2):
    """Its weights by their names on the hub."""
    weights = {}
    for name, weight in dinov2.state_dict().items():
        for new, old in RENAMED.items():
            name = name.replace(new, old)
        weights[name] = weight.numpy()
    return weights


@pytest.fixture(scope="session")
def exported():
    return _exported


def _exported(weights):
    """Constants and nodes like those of torch's exporter: linear weights transposed and unnamed."""
    constants = {
        "decoder.conv.weight": weights["embeddings.cls_token"] * 2,
        "onnx::MatMul_9": np.eye(3, dtype=np.float32),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "onnx::MatMul_9"], ["d"], "/decoder/linear/MatMul"),
        helper.make_node("Concat", ["x", "y"], ["z"], "/backbone/embeddings/Concat", axis=1),
    ]
    for name, weight in weights.items():
        path = name.rpartition(".")[0].replace(".", "/")
        number = f"{len(constants) + 100}"
        if name == "embeddings.position_embeddings":
            constants["onnx::Concat_7"], constants["onnx::Reshape_8"] = weight[:, :1], weight[:, 1:]
            nodes += [
                helper.make_node(
                    "Reshape", ["onnx::Reshape_8", "s"], ["r"], "/backbone/embeddings/Reshape_1"
                ),
                helper.make_node(
                    "Concat", ["onnx::Concat_7", "r"], ["p"], "/backbone/embeddings/Concat_6", axis=1
                ),
            ]
        elif weight.ndim == 2:
            constants[f"onnx::MatMul_{number}"] = weight.T
            inputs = ["x", f"onnx::MatMul_{number}"]
            nodes.append(helper.make_node("MatMul", inputs, [f"y{number}"], f"/backbone/{path}/MatMul"))
        else:
            constants[f"backbone.{name}"] = weight
            inputs = ["x", f"backbone.{name}"]
            nodes.append(helper.make_node("Add", inputs, [f"y{number}"], f"/backbone/{path}/Add"))
    initializers = [
        numpy_helper.from_array(torch.as_tensor(value).numpy(), name) for name, value in constants.items()
    ]
    return helper.make_model(helper.make_graph(nodes, "tiny", [], [], initializers))


@pytest.fixture(scope="session")
def hosts(tmp_path_factory):
    """The maker of tiny vision-language models, each with its folder; to be read only."""
    save = runpy.run_path(str(Path(__file__).with_name("hosts.py")))["save"]

    @cache
    def host(kind):
        folder = tmp_path_factory.mktemp("host") / kind
        return save(kind, folder), folder

    return host
