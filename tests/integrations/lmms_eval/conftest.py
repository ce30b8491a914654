"""The tiny models of tests/vlm, with selectors, as reduced models."""

import runpy
from pathlib import Path

import pytest
import torch

from atr import FeatureSelector
from atr.integrations.lmms_eval.arguments import Arguments
from atr.integrations.lmms_eval.prompts import prompt_of
from atr.integrations.lmms_eval.reduced_vlm import ReducedVlm

_VLM = runpy.run_path(str(Path(__file__).parents[2] / "vlm/conftest.py"))
tokenizer, family, processor = _VLM["tokenizer"], _VLM["family"], _VLM["processor"]
make_model, model = _VLM["make_model"], _VLM["model"]


@pytest.fixture
def selector(family):
    """A selector for the tiny models' features, with a random head so that scores differ."""
    torch.manual_seed(1)
    layer = -2 if family != "llava_onevision" else -1
    selector = FeatureSelector(24, (4, 4), layers=1, heads=2, encoder="tiny/tower", layer=layer)
    torch.nn.init.normal_(selector.trunk.head.weight)
    return selector.eval()


@pytest.fixture
def make_vlm(model, processor, selector):
    """Creates a reduced model from arguments, without loading a folder."""

    def make(**arguments):
        given = {"pretrained": "tiny/llava", "selector": "tiny/selector", "keep": 1.0} | arguments
        arguments = Arguments.of(given)
        return ReducedVlm(
            model, processor, selector, arguments, prompt_of(model.config.model_type, arguments)
        )

    return make
