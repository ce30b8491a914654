#!/usr/bin/env bash
# transformers 5.23.0: position ids with a gap, and no mask, are one sequence with use_cache=True and two packed ones
# with use_cache=False: the second half then does not see the first. A mask of ones says that it is one sequence;
# generate(use_cache=False) drops such a mask.
# Seen: logits of use_cache=False differ by 0.51 from those of use_cache=True, with a mask of ones by 0.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0

"$folder/venv/bin/python" - <<'PY'
import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=97, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
)
model = LlamaForCausalLM(config).eval()
input_ids = torch.arange(12)[None]
position_ids = torch.tensor([[*range(6), *range(20, 26)]])
ones = torch.ones_like(input_ids)
with torch.no_grad():
    cached = model(input_ids, position_ids=position_ids, use_cache=True).logits
    uncached = model(input_ids, position_ids=position_ids, use_cache=False).logits
    masked = model(input_ids, attention_mask=ones, position_ids=position_ids, use_cache=False).logits
silent, told = ((logits - cached).abs().max().item() for logits in (uncached, masked))
print(f"difference to use_cache=True: {silent:.2f} without a mask, {told:.2f} with a mask of ones")
assert silent > 0.1 and told < 1e-5, "the behaviour has changed"
PY
