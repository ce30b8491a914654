#!/usr/bin/env bash
# transformers 5.23.0: the vision tower of Qwen2.5-VL, asked for output_attentions=True, also under eager attention,
# gives `attentions` of shape (patches, width): what each attention module returns, and no attention weights. A method
# that ranks tokens by them computes on hidden states, without an error.
# Seen: shape (64, 32) for 64 patches and 4 heads, and the module's own output, bit by bit.
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
tower.set_attn_implementation("eager")
own = []
tower.blocks[1].attn.register_forward_hook(lambda module, inputs, output: own.append(output))
with torch.no_grad():
    output = tower(torch.randn(64, 1176), grid_thw=torch.tensor([[1, 8, 8]]), output_attentions=True)
last = output.attentions[-1]
print("attentions:", tuple(last.shape), "equal to the module's output:", torch.equal(last, own[0]))
sys.exit(last.shape != (64, 32) or not torch.equal(last, own[0]))
PY
