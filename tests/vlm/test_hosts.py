import pytest
import torch

from atr.vlm.hosts import HOSTS, host_of


@pytest.mark.parametrize("layer", [-2, 1, -1, [1, -2]])
@torch.no_grad()
def test_llava_encodes_and_packs_what_the_model_itself_reads(model, process, layer):
    model.config.vision_feature_layer = layer
    if isinstance(layer, list):
        model.model.multi_modal_projector.linear_1 = torch.nn.Linear(24 * len(layer), 32)
    inputs = process("<image> a", "<image> <image>")
    host = HOSTS["llava"]
    encoded = host.encode(model, inputs)
    own = model.model.get_image_features(inputs["pixel_values"]).pooler_output
    assert encoded.grid == (4, 4)
    assert encoded.tokens == 16
    assert all(map(torch.equal, host.pack(model, encoded.features_BND), own))


def test_a_tower_whose_class_token_is_read_does_not_fit_the_grid(model, process):
    model.config.vision_feature_select_strategy = "full"
    with pytest.raises(ValueError, match="17 tokens"):
        HOSTS["llava"].encode(model, process("<image>"))


def test_a_family_without_host_is_refused_by_name(model):
    model.config.model_type = "kosmos"
    with pytest.raises(ValueError, match="'kosmos' is not supported, allowed: llava"):
        host_of(model)
