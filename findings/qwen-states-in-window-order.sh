#!/usr/bin/env bash
# transformers 5.23.0: get_image_features of Qwen2.5-VL returns two tensors of one image in two orders: `pooler_output`
# in raster order of the merged tokens, `last_hidden_state` in the order of the attention windows. Scores that are
# computed from the second and applied to the first choose other tokens, without an error. Up to one window (112 x 112
# pixels) both orders are the same, so that a small example does not show it.
# Seen: the merger applied to last_hidden_state is pooler_output at 8 x 8 patches, and a permutation of it at 16 x 16.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0

"$folder/venv/bin/python" - <<'PY'
import sys

import torch
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

torch.manual_seed(0)
config = Qwen2_5_VLVisionConfig(
    depth=2, hidden_size=32, intermediate_size=64, num_heads=4, out_hidden_size=32, fullatt_block_indexes=[1]
)
tower = Qwen2_5_VisionTransformerPretrainedModel(config).eval()
found = {}
for side in (8, 16):
    with torch.no_grad():
        output = tower(torch.randn(side**2, 1176), grid_thw=torch.tensor([[1, side, side]]))
        merged, pooled = tower.merger(output.last_hidden_state), output.pooler_output
    in_order = torch.allclose(merged, pooled, atol=1e-6)
    nearest = torch.cdist(merged, pooled, compute_mode="donot_use_mm_for_euclid_dist").min(1)
    is_permutation = bool((nearest.values < 1e-5).all()) and len(nearest.indices.unique()) == len(pooled)
    found[side] = in_order, is_permutation
    print(f"{side} x {side} patches: same order {in_order}, the same tokens {is_permutation}")
sys.exit(found != {8: (True, True), 16: (False, True)})
PY
