"""Adaptive token reduction for vision-language models, after arXiv 2503.16660."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from atr.reduction.selector import FeatureSelector
    from atr.vlm.boxes import token_boxes
    from atr.vlm.input_checks import check_inputs
    from atr.vlm.reduce import reduce

__all__ = ["FeatureSelector", "__version__", "check_inputs", "reduce", "token_boxes"]
__version__ = "0.1.0"

# Imported at first use, so that `import atr`, and with it every config error, does not wait for torch.
_HOMES = {
    "FeatureSelector": "atr.reduction.selector",
    "check_inputs": "atr.vlm.input_checks",
    "reduce": "atr.vlm.reduce",
    "token_boxes": "atr.vlm.boxes",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
