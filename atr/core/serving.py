"""Which reducers serve which model families, said before anything heavy is imported or loaded.

A reducer says in constants at the top of its file what it needs (`atr.core.catalog.ReducerTraits`); a family
is of one of FAMILY_KINDS. A user's reducer without such constants is not refused here, but when images are
encoded, if it needs what the family does not give.
"""

from collections.abc import Callable

from atr.core import catalog

FAMILY_KINDS = {
    "llava": "LLaVA-1.5",
    "llava_tiled": "LLaVA with tiles",
    "one_size": "one size",
    "tiled": "tiles",
    "native": "native resolution",
    "no_tower": "no tower",
}
"""Kinds of model families and their titles in tables."""
FAMILIES = {
    "llava": "llava",
    "llava_next": "llava_tiled",
    "llava_next_video": "llava_tiled",
    "llava_onevision": "llava_tiled",
    "gemma3": "one_size",
    "got_ocr2": "one_size",
    "paligemma": "one_size",
    "vipllava": "one_size",
    "aya_vision": "tiled",
    "cohere2_vision": "tiled",
    "idefics3": "tiled",
    "internvl": "tiled",
    "lfm2_vl": "tiled",
    "minicpmv4_6": "tiled",
    "ovis2": "tiled",
    "smolvlm": "tiled",
    "ernie4_5_vl_moe": "native",
    "exaone4_5": "native",
    "gemma4": "native",
    "glm46v": "native",
    "glm4v": "native",
    "glm_ocr": "native",
    "hyperclovax_vision_v2": "native",
    "kimi_k25": "native",
    "lighton_ocr": "native",
    "mistral3": "native",
    "paddleocr_vl": "native",
    "qwen2_5_vl": "native",
    "qwen2_vl": "native",
    "qwen3_5": "native",
    "qwen3_5_moe": "native",
    "qwen3_vl": "native",
    "qwen3_vl_moe": "native",
    "gemma4_unified": "no_tower",
}
"""The kind of each model type."""
SEVERAL_LAYERS = ("qwen3_vl", "qwen3_vl_moe")
"""Model types whose language model is also given features of earlier layers of the tower (deepstack)."""
_LLAVA = ("llava", "llava_next", "llava_next_video", "llava_onevision")
"""Model types with code of their own, which gives reducers everything."""


def observed_types() -> list[str]:
    """The model types outside LLaVA's whose attention and keys can be computed, in alphabetical order."""
    file = catalog.PACKAGE / "features" / "query_key_attention.py"
    return sorted(catalog.constants(file)["PATCH_ORDER"])


def serves(reducer: str, model_type: str, is_cut: bool | None = None) -> str:
    """Why a reducer cannot serve a model family, in words that follow the reducer's name; empty if it can.

    `reducer` is a built-in name or the path of the user's file without `.py`, `model_type` that of
    transformers, and `is_cut` says whether its processor cuts images into tiles (None: as its kind does).
    Of a type that is not in FAMILIES, such as a user's own family, nothing but tiles is known. Raises
    ValueError as `reducer_traits` does.
    """
    traits, kind = catalog.reducer_traits(reducer), FAMILIES.get(model_type, "")
    if kind in ("llava_tiled", "tiled") if is_cut is None else is_cut:
        if traits.one_tile:
            return f"cannot serve {model_type}, which cuts images into tiles"
        if "first_attention_BN" in traits.needs and kind and model_type not in _LLAVA:
            return f"splits its budget by a first tile of the whole image, which {model_type} does not have"
    reasons = (reason(traits, model_type) for reason in _REASONS if kind and model_type not in _LLAVA)
    return next(filter(None, reasons), "")


def serving_reducers(model_type: str, is_cut: bool | None = None) -> list[str]:
    """The built-in reducers that serve a model family, in the order of `atr.core.catalog.reducers`."""
    return [name for name in catalog.reducers() if not serves(name, model_type, is_cut)]


def _merged(traits: catalog.ReducerTraits, model_type: str) -> str:
    if not traits.merges or model_type not in SEVERAL_LAYERS:
        return ""
    return f"merges tokens of one layer, and {model_type} feeds its language model those of several"


def _of_llava(traits: catalog.ReducerTraits, model_type: str) -> str:
    """What families by the rule do not give."""
    needs = sorted({"pixels_BCHW", "encode"} & set(traits.needs))
    what = "prunes inside the language model" if traits.inside_llm else needs and f"needs {needs[0]}"
    return f"{what}, which {model_type} does not serve" if what else ""


def _of_towers(traits: catalog.ReducerTraits, model_type: str) -> str:
    needed = sorted({"attention_BN", "first_attention_BN", "keys_BND"} & set(traits.needs))
    if not needed or model_type in observed_types():
        return ""
    return f"needs {needed[0]}, which the tower of {model_type} does not give"


_REASONS: tuple[Callable[[catalog.ReducerTraits, str], str], ...] = (_merged, _of_llava, _of_towers)
