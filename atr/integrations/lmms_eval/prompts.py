"""How lmms-eval's own classes ask each model family, so that scores are of the same questions.

The table is that of lmms-eval 0.7.3. With all tokens kept a model gets the token ids and the pixels that the
class named here would give it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from atr.integrations.lmms_eval.arguments import Arguments
from atr.integrations.lmms_eval.images import Rounding

HELPFUL = "You are a helpful assistant."
NOTHING: Mapping[str, Any] = MappingProxyType({})
OVERRIDES = {"images": ("min_pixels", "max_pixels", "max_patches"), "template": ("enable_thinking",)}
"""Arguments that replace a value of the table, by the field of Prompt that has the value."""


@dataclass(frozen=True)
class Prompt:
    """How one of lmms-eval's classes turns a question into a model's input and its output into an answer."""

    model: str
    """Name of the class in lmms-eval; tasks may have a wording for it."""
    decoding: Mapping[str, Any] = field(default_factory=lambda: NOTHING)
    """Options of `generate` where the task names none."""
    system: str | None = None
    """System turn before the conversation; without one the chat template may have its own."""
    template: Mapping[str, Any] = field(default_factory=lambda: NOTHING)
    """Keywords of the chat template."""
    images: Mapping[str, Any] = field(default_factory=lambda: NOTHING)
    """Keywords of the processor for images."""
    multiple: int = 0
    """Sides of images are rounded to multiples of it before the processor resizes; 0 for none."""
    is_rounding_bounded: bool = False
    """Whether that rounding keeps the pixel bounds of `images`, too; else those of qwen-vl-utils."""
    is_rgb: bool = False
    """Whether images lose their transparency before the processor, with the colour that was hidden."""
    is_jpeg: bool = False
    """Whether images pass through JPEG of quality 85."""
    dropped: str = ""
    """Regular expression of tags that are removed from questions."""
    is_tokenized_once: bool = False
    """Whether a beginning token of the chat template is the only one; else the tokenizer may add another."""
    is_instruct: bool = False
    """Whether Mistral's [INST] prompt replaces the chat template for images."""
    stops: bool = False
    """Whether answers end before the strings that the task names in `until`."""
    spared: tuple[str, ...] = ()
    """Strings of `until` that do not end an answer."""

    @property
    def rounding(self) -> Rounding | None:
        """Resizing before the processor's; None if there is none."""
        if not self.multiple:
            return None
        if self.is_rounding_bounded:
            return Rounding(self.multiple, self.images["min_pixels"], self.images["max_pixels"])
        return Rounding.of(self.multiple)


def _simple(model: str, tokens: int, dropped: str = "<image>", **fields: Any) -> Prompt:
    """The older classes: JPEG, no tags, and answers cut at `until`."""
    return Prompt(model, {"max_new_tokens": tokens}, is_jpeg=True, dropped=dropped, stops=True, **fields)


_LLAVA = Prompt("llava_hf", {"max_new_tokens": 1024})
_QWEN2 = _simple(
    "qwen2_vl",
    128,
    system=HELPFUL,
    images={"min_pixels": 3136, "max_pixels": 602112},
    multiple=28,
    is_rounding_bounded=True,
)
_QWEN2_5 = Prompt(
    "qwen2_5_vl",
    {"max_new_tokens": 128},
    images={"min_pixels": 256 * 28 * 28, "max_pixels": 1605632},
    multiple=28,
)
_QWEN3 = Prompt("qwen3_vl", {"max_new_tokens": 128}, HELPFUL, images={"do_resize": False}, multiple=32)
_QWEN3_5 = replace(
    _QWEN3,
    model="qwen3_5",
    decoding={"max_new_tokens": 1024, "temperature": 0.7, "top_p": 0.8, "top_k": 20},
    template={"enable_thinking": True},
)
_GEMMA3 = _simple(
    "gemma3", 128, r"<image(?: \d+)?>", system=HELPFUL, is_tokenized_once=True, spared=("\n\n",)
)
_GEMMA4 = replace(_GEMMA3, model="gemma4", images={"max_soft_tokens": 280})
_GLM = _simple("glm4v", 8192, is_tokenized_once=True)
_MISTRAL3 = Prompt(
    "mistral3_vl",
    {"max_new_tokens": 512, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.2},
    is_instruct=True,
)
BY_TYPE: Mapping[str, Prompt] = {
    "llava": _LLAVA,
    "llava_next": _LLAVA,
    "llava_onevision": _LLAVA,
    "qwen2_vl": _QWEN2,
    "qwen2_5_vl": _QWEN2_5,
    "qwen3_vl": _QWEN3,
    "qwen3_vl_moe": _QWEN3,
    "qwen3_5": _QWEN3_5,
    "qwen3_5_moe": _QWEN3_5,
    "internvl": Prompt("internvl_hf", {"max_new_tokens": 1024}, images={"min_patches": 1, "max_patches": 12}),
    "gemma3": _GEMMA3,
    "gemma4": _GEMMA4,
    "gemma4_unified": _GEMMA4,
    "glm4v": _GLM,
    "glm4v_moe": _GLM,
    "glm46v": _GLM,
    "mistral3": _MISTRAL3,
    "lfm2_vl": Prompt("lfm2_5_vl", {"max_new_tokens": 1024}, is_rgb=True),
}
"""By model type. Families without an entry are asked as by lmms-eval's general class."""
GENERAL = Prompt("huggingface", {"max_new_tokens": 4096})


def prompt_of(model_type: str, arguments: Arguments) -> Prompt:
    """How lmms-eval asks models of this type, with the user's values in place of the table's.

    Raises ValueError naming an argument that the family has no use for.
    """
    prompt = BY_TYPE.get(model_type, GENERAL)
    if arguments.system_prompt is not None:
        prompt = replace(prompt, system=arguments.system_prompt)
    images = _override("images", prompt, model_type, arguments)
    return replace(prompt, images=images, template=_override("template", prompt, model_type, arguments))


def _override(place: str, prompt: Prompt, model_type: str, arguments: Arguments) -> Mapping[str, Any]:
    """A field's values with those of the user; errors as in `prompt_of`."""
    values: Mapping[str, Any] = getattr(prompt, place)
    given = {key: getattr(arguments, key) for key in OVERRIDES[place]}
    given = {key: value for key, value in given.items() if value is not None}
    if unused := [key for key in given if key not in values]:
        allowed = ", ".join(name for name in BY_TYPE if unused[0] in getattr(BY_TYPE[name], place))
        raise ValueError(
            f"{unused[0]}: {given[unused[0]]!r} is not allowed for {model_type}: its class in lmms-eval has "
            f"none, allowed for: {allowed}"
        )
    return {**values, **given}
