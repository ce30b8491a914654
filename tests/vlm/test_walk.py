"""How many of our functions one reads from `reduce` to the logits of the selector."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import atr
from atr.core.fingerprint import fingerprint
from atr.reduction import FeatureSelector
from atr.vlm.reduce import reduce

PACKAGE = Path(atr.__file__).parent
MOST_FUNCTIONS, MOST_FILES = 6, 4
LOGITS = FeatureSelector.rank.__qualname__
"""Where the selector's own forward begins; what it calls is not counted."""

Chain = tuple[tuple[str, str], ...]
"""File and function of each frame, the outermost first."""


def chain_of(frame) -> Chain:
    """The frames of functions of the package; comprehensions belong to the function around them."""
    frames = []
    while frame is not None:
        path, code = Path(frame.f_code.co_filename), frame.f_code
        if path.is_relative_to(PACKAGE) and not code.co_name.startswith("<"):
            frames.append((path.relative_to(PACKAGE).as_posix(), code.co_qualname))
        frame = frame.f_back
    chain = tuple(reversed(frames))
    names = [name for _, name in chain]
    return chain[: names.index(LOGITS) + 1] if LOGITS in names else chain


def chains_under(call: Callable[[], object]) -> set[Chain]:
    """The chain of every call of a function below `call`."""
    chains = set()

    def record(frame, event, _):
        if event == "call":
            chains.add(chain_of(frame))

    sys.setprofile(record)
    try:
        call()
    finally:
        sys.setprofile(None)
    return chains


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_the_walk_from_reduce_to_a_logit_is_short(model, process):
    selector = FeatureSelector(width=24, grid=(4, 4), layers=1, heads=2).eval()
    selector.note(fingerprint=fingerprint(model.model.vision_tower), positions="original")
    inputs = process("<image> a b")
    reduce(model, inputs, selector, keep=0.4)  # imports the family
    chains = chains_under(lambda: reduce(model, inputs, selector, keep=0.4))
    depth = max(map(len, chains))
    deepest = [chain for chain in chains if len(chain) == depth]
    assert [chain for chain in chains if chain and chain[-1][1] == LOGITS], "the selector is not reached"
    assert depth <= MOST_FUNCTIONS, deepest
    assert all(len({file for file, _ in chain}) <= MOST_FILES for chain in deepest), deepest
