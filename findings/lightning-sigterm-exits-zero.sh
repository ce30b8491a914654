#!/usr/bin/env bash
# lightning 2.6.6: a SIGTERM in the midst of Trainer.fit ends the process with exit code 0, behind no later line.
# Seen: exit code 0 and no "fit returned". What starts a training by its exit code takes the fourth step for the last.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 lightning==2.6.6

cat >"$folder/train.py" <<'PY'
import os
import signal

import torch
from lightning.pytorch import LightningModule, Trainer


class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        if batch_idx == 3:
            os.kill(os.getpid(), signal.SIGTERM)  # as a scheduler does
        return self.linear(batch[0]).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(100, 2)))
trainer = Trainer(
    max_epochs=1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False
)
trainer.fit(Model(), data)
print("fit returned")
PY

code=0
output=$("$folder/venv/bin/python" "$folder/train.py" 2>/dev/null) || code=$?
echo "exit code $code, output: '$(grep 'fit returned' <<<"$output" || true)'"
[ "$code" -eq 0 ] && ! grep --quiet 'fit returned' <<<"$output" || {
    echo 'the behaviour has changed' >&2
    exit 1
}
