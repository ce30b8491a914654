"""Reading weights from an ONNX graph like those of torch's exporter."""

import pytest

from atr.features.onnx_weights import read_dinov2_weights


def test_every_weight_is_read_under_its_published_name(dinov2_weights, exported):
    read = read_dinov2_weights(exported(dinov2_weights))
    assert read.keys() == dinov2_weights.keys()
    for name, weight in dinov2_weights.items():
        assert read[name].shape == weight.shape and (read[name] == weight).all(), name
        assert read[name].flags.c_contiguous and read[name].dtype == "float32"


@pytest.mark.parametrize("part", ["onnx::Concat_7", "onnx::Reshape_8"])
def test_a_graph_without_a_position_embedding_is_refused(part, dinov2_weights, exported):
    model = exported(dinov2_weights)
    kept = [constant for constant in model.graph.initializer if constant.name != part]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    with pytest.raises(ValueError, match=r"1 parts of embeddings\.position_embeddings, needed: 2"):
        read_dinov2_weights(model)
