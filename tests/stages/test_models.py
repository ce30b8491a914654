"""The files that say which encoder and model params.yaml names."""

from pathlib import Path

import pytest

from atr import config
from atr.config.presets import ENCODERS, VLMS
from atr.core.files import read_json
from atr.stages import MODELS, models

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "encoder, vlm, chosen",
    [("micro", "auto", "micro"), ("dinov2-small", "micro-dinov2", "micro-dinov2")],
)
def test_the_presets_are_written_as_they_are_resolved(tmp_path, monkeypatch, encoder, vlm, chosen):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "params.yaml").read_text()
    text = text.replace("encoder: micro", f"encoder: {encoder}", 1).replace("vlm: auto", f"vlm: {vlm}", 1)
    Path("params.yaml").write_text(text.replace("heads: 3", "heads: 6"))
    models.main(config.load("models"))
    assert read_json(MODELS / "encoder.json")["path"] == ENCODERS[encoder].path
    assert read_json(MODELS / "vlm.json")["name"] == VLMS[chosen].name
