import re

import pytest
import torch

from atr import FeatureSelector
from atr.integrations.lmms_eval.arguments import Arguments
from atr.integrations.lmms_eval.reduced_vlm import ReducedVlm
from atr.integrations.lmms_eval.selector_digest import check_selector_digest, digest_selector


def simple_evaluate(make, use_cache=None):
    """Like lmms-eval's function of this name, which creates the model and does not pass it `use_cache`."""
    return make()


def test_the_digest_covers_weights_and_configuration_and_survives_saving(selector, tmp_path):
    own = digest_selector(selector)
    assert re.fullmatch(r"sha256-[0-9a-f]{16}", own)
    selector.save_pretrained(tmp_path)
    assert digest_selector(FeatureSelector.from_pretrained(tmp_path)) == own
    selector.note(taught_by="tiny")  # now its scores are used with coverage
    noted = digest_selector(selector)
    with torch.no_grad():
        selector.trunk.head.weight[0, 0] += 1e-6
    assert len({own, noted, digest_selector(selector)}) == 3


def test_with_a_cache_the_digest_is_required(selector):
    message = (
        f"selector_digest: is missing, .* by its path alone: selector_digest={digest_selector(selector)}$"
    )
    with pytest.raises(ValueError, match=message):
        simple_evaluate(lambda: check_selector_digest(None, selector), use_cache="kept")
    simple_evaluate(lambda: check_selector_digest(digest_selector(selector), selector), use_cache="kept")
    simple_evaluate(lambda: check_selector_digest(None, selector))
    check_selector_digest(None, selector)


def test_the_digest_of_another_selector_is_refused_before_the_model_is_loaded(selector, tmp_path):
    selector.save_pretrained(tmp_path)
    arguments = {"pretrained": "no/where", "selector": str(tmp_path), "keep": 0.5}
    former = Arguments.of(arguments | {"selector_digest": "sha256-0123456789abcdef"})
    with pytest.raises(
        ValueError,
        match=rf"'sha256-0123456789abcdef' is another .*, this one has {digest_selector(selector)}",
    ):
        ReducedVlm.load(former, torch.device("cpu"))
